"""The words that a workload's log must not show, kept as long as the workload runs.

Airflow has one masker for a process, so words that one task or DAG file had masked are masked in other logs too. Each new
word also makes Airflow compile all words into one pattern again, which takes longer each time. Here a word costs nothing
until a line is written.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from airflow.sdk._shared.secrets_masker import secrets_masker

if TYPE_CHECKING:
    from collections.abc import Callable
    from re import Pattern

    from structlog.typing import FilteringBoundLogger

#: Bounds, because each line is searched for each word.
WORDS_LIMIT: Final = 1000
CHARACTERS_LIMIT: Final = 1024 * 1024

FULL: Final = (
    f"More than {WORDS_LIMIT} words, or {CHARACTERS_LIMIT} characters, were to be masked. Further words are not masked, "
    "and show when they are logged"
)


class Masks:
    """The words of one workload."""

    def __init__(self, *, before: Pattern[str] | None = None, full: Callable[[], object]) -> None:
        """
        :param before: a pattern that is always replaced.
        :param full: called once, when a word is refused because there are too many.
        """  # noqa: D212
        self._before = before
        self._full = full
        self._is_full = False
        self._has_told = False
        self._characters = 0
        self._words: list[str] = []

    def add(self, secret: Any, name: str | None = None) -> None:
        """Mask a text, or all texts in a list or map.

        Airflow's rules say which are too short, and which names hide a value.
        """
        masker = secrets_masker._secrets_masker()  # noqa: SLF001 - its rules; there is no public way to them
        todo = [(secret, name)]
        while todo and not self._is_full:
            value, name = todo.pop()
            if isinstance(value, dict):
                todo += [(item, key) for key, item in value.items()]
            elif isinstance(value, str):
                if value.lower() not in secrets_masker.SECRETS_TO_SKIP_MASKING and (
                    not name or masker.should_hide_value_for_key(name)  # type: ignore[no-untyped-call]
                ):
                    for word in masker._adaptations(value):  # noqa: SLF001
                        self._add_word(word, masker.min_length_to_mask)
            elif isinstance(value, Iterable):
                todo += [(item, name) for item in value]

    def _add_word(self, word: str, shortest: int) -> None:
        if not word or len(word) < shortest or word in self._words:
            return
        if word.lower() in secrets_masker.SECRETS_TO_SKIP_MASKING:
            return
        if len(self._words) >= WORDS_LIMIT or self._characters + len(word) > CHARACTERS_LIMIT:
            # A word that is too long is refused; shorter ones may still fit.
            self._is_full = len(self._words) >= WORDS_LIMIT
            if not self._has_told:
                self._has_told = True
                self._full()
            return
        self._characters += len(word)
        # The longest first, because a word may be part of another.
        insort(self._words, word, key=lambda other: -len(other))

    def sub(self, replacement: str, text: str) -> str:
        """As ``re.Pattern.sub``, because Airflow's masker calls that."""
        for word in self._words:
            text = text.replace(word, replacement)
        return text if self._before is None else self._before.sub(replacement, text)

    def hide(self, value: Any) -> Any:
        """A JSON value with the words masked, in keys too."""
        if not self._words:
            return value
        if isinstance(value, str):
            return self.sub("***", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value


@contextmanager
def own_masks(log: FilteringBoundLogger) -> Iterator[None]:
    """All words that any code of this process masks during the block are masked until the block ends, not longer."""
    masker = secrets_masker._secrets_masker()  # noqa: SLF001 - Airflow's one of this process
    before = masker.replacer
    masks = Masks(before=before, full=lambda: log.warning(FULL))
    masker.replacer = masks  # type: ignore[assignment]  # it is only asked to substitute
    masker.add_mask = masks.add  # type: ignore[method-assign]
    try:
        yield
    finally:
        del masker.add_mask
        masker.replacer = before
