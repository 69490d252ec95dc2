"""Windows of one prompt that learns within itself: each is learned before the next is read. Knows no HTTP."""

from collections.abc import Callable
from functools import partial

from keystore.records import ScopeId
from keystore.store import KeyStore
from model.keys import KeyView
from server.crediting import RowsByLayer
from server.engine.renewal import KeyRenewal
from server.engine.sequence import Lesson
from server.plasticity import Epoch, OpenWindow, Teacher


class PromptWindows:
    """Takes a prompt's lessons, none of which reaches over a border between two windows of `window_tokens`.

    Its full windows are its own: they begin at its first token, whatever else the scope learns meanwhile, so what
    they teach depends on the prompt alone. What is left behind the last border goes to the scope's common window.
    `done` is called with each border once its window has been learned or never will be.
    """

    def __init__(
        self,
        teacher: Teacher,
        scope: ScopeId,
        window_tokens: int,
        prompt_tokens: int,
        done: Callable[[int], None],
    ):
        self._teacher, self._scope, self._done = teacher, scope, done
        self._window_tokens = window_tokens
        self._last_border = (prompt_tokens - 1) // window_tokens * window_tokens
        self._window = OpenWindow(teacher.epoch(scope))

    def __call__(self, lesson: Lesson) -> None:
        end, epoch = lesson.start + len(lesson.targets), self._teacher.epoch(self._scope)
        if end > self._last_border:
            self._teacher.take(self._scope, lesson, epoch=epoch)
        else:
            self._teacher.credit(self._scope, lesson, 1.0, partial(self._collect, end, epoch))

    def _collect(self, end: int, epoch: Epoch, rows: RowsByLayer | None) -> None:
        if rows is not None:
            self._window.add(rows, epoch)
        if end % self._window_tokens:
            return
        window, self._window = self._window, OpenWindow(epoch)
        done = partial(self._done, end)
        if not window.tokens or not self._teacher.submit(self._scope, window, window.tokens, done):
            done()


def learn_within(
    teacher: Teacher,
    store: KeyStore,
    scope: ScopeId,
    keys: KeyView,
    prompt_tokens: int,
    wake: Callable[[], None],
) -> tuple[KeyRenewal, PromptWindows]:
    """For a prompt that begins with `keys`: what it waits for, and what takes its lessons."""
    window_tokens = store.gravity.window_tokens
    renewal = KeyRenewal(window_tokens, keys, wake)

    def offer(border: int) -> None:
        renewal.offer(border, store.view(scope))

    return renewal, PromptWindows(teacher, scope, window_tokens, prompt_tokens, offer)
