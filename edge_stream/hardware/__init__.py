"""What a model runs on: devices and their memory, and which of the bank's operations each has."""
