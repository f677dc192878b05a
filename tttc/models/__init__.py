"""`tttc.models`: ready models, as modules that `tttc.nn.EndToEnd` takes, and how their inner rate rises."""

from tttc.models import e2e
from tttc.models.schedule import inner_rate

__all__ = ["e2e", "inner_rate"]
