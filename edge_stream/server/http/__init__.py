"""What every API shares: requests and their checks, answers, channels, the page."""
