"""`tttc demo`: declare a layer that was made up for it, compile it, prove it, time it, train it."""
