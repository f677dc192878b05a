"""What is fastest: measured on this device, or predicted for one that is not here; and what was found, kept."""
