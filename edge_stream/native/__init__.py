"""The native libraries: finding and loading them, their ctypes declarations, and callbacks into Python."""
