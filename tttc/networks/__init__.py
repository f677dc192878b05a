"""`tttc.networks`: whole networks, some of whose weights learn while they read."""
