"""`tttc.models`: ready models, as modules that `tttc.nn.EndToEnd` takes."""
