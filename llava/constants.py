"""Placeholder tokens, their ids, ways of generating, and the demo's heart beat."""

# Demo: seconds after which a silent worker is dropped, and between two signs of life.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."  # folder of the log files of the demo

IGNORE_INDEX = -100  # label of a position that is not trained on
IMAGE_TOKEN_INDEX = -200  # stands for one whole image in `input_ids`; not in any vocabulary

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_VIDEO_TOKEN = "<video>"  # in texts alone: a prompt has the mark of an image there
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"  # where a command-line query wants its image
VIDEO_PLACEHOLDER = "<video-placeholder>"  # and its video

# ways from one token of an answer to the next; the second needs a method that guesses tokens
STRATEGIES = ("autoregressive", "self_speculative")
