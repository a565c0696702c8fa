"""The model as a service: chat in a terminal."""
