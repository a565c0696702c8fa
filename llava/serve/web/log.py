"""What the page writes down. Dialogues and images only when that was asked for."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import time
from contextlib import suppress
from pathlib import Path

from llava.conversation import Conversation

logger = logging.getLogger("llava.serve.web")


class ConversationLog:
    """Votes and chats as JSON lines, one file a day, in the layout of the published demo.

    folder:      where the files go
    texts:       write dialogues; without it only the kind of a vote and the model are logged
    keep_images: also store the images, `serve_images/<date>/<hash>.jpg`
    lost:        dialogues that could not be written, since the last one that could: a full disk is
                 no reason to fail a visitor whose question was answered
    """

    def __init__(self, folder: str | Path, texts: bool = False, keep_images: bool = False):
        self.folder, self.texts, self.keep_images = Path(folder), texts, keep_images
        self.lost = 0

    def vote(self, kind: str, model: str, conversation: Conversation, ip: str) -> None:
        """kind: upvote, downvote or flag."""
        logger.info("%s for %s", kind, ascii(model))
        if self.texts:
            self._write(
                {"tstamp": round(time.time(), 4), "type": kind, "model": model}
                | {"state": conversation.dict(), "ip": ip}
            )

    def chat(self, model: str, conversation: Conversation, start: float, ip: str) -> None:
        """A finished answer; start: time of the question."""
        if not self.texts:
            return
        finish = time.time()
        self._write(
            {"tstamp": round(finish, 4), "type": "chat", "model": model}
            | {"start": round(start, 4), "finish": round(finish, 4)}
            | {"state": conversation.dict(), "images": self._images(conversation), "ip": ip}
        )

    def _images(self, conversation: Conversation) -> list[str]:
        """Hashes of the images, which are stored first where that was asked for."""
        names = []
        for image in conversation.get_images(return_pil=True):
            name = hashlib.md5(f"{image.size}".encode() + image.tobytes()).hexdigest()
            names.append(name)
            path = self.folder / "serve_images" / _today() / f"{name}.jpg"
            if self.keep_images and not path.is_file():
                self._save(image, path)
        return names

    def _save(self, image, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        except OSError as error:
            self._note(error)
            with suppress(OSError):
                path.unlink(missing_ok=True)  # half of it

    def _write(self, entry: dict) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{_today()}-conv.json", "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, "only a part of the line has room")
        except OSError as error:
            self._note(error)
            return
        if self.lost:
            logger.warning("%s dialogues or images could not be stored and are lost", self.lost)
            self.lost = 0

    def _note(self, error: OSError) -> None:
        if not self.lost:
            logger.error("dialogues cannot be stored: %s", error.strerror)
        self.lost += 1


def _today() -> str:
    return datetime.date.today().isoformat()
