"""Models for the iOS app: what fits a phone, and the folder that the app imports."""
