"""The version of this package, which is also said where nothing else of it is imported."""

__version__ = "0.1.0"
