"""What a model runs on: processor, devices and their memory, what of the bank each can do, installed versions."""
