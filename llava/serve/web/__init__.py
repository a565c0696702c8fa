"""The parts of the web page; `llava.serve.gradio_web_server` puts them together."""
