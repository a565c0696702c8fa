"""The model as a service: controller, workers, web page, and a chat in a terminal."""
