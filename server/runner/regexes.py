"""Regular expressions as JSON Schema means them (ECMA-262), rewritten so that the matching library reads them alike.

Dialects agree on most of the syntax and differ silently on the rest: what `.` and `\\s` hold, what `[a&&b]` and `(?x)`
mean. So nothing is handed on as it came. Every character is written by its number, every class spelt out, and what this
parser does not know is refused by name. Pure text, any thread, linear time.
"""

from __future__ import annotations

from server.runner.refusal import Refused

MAX_GROUPS_DEEP = 32
MAX_REPEATS = 10_000
"""Product of the counts of nested repetitions: the library unrolls them."""

_LINE_ENDS = r"\n\r\x{2028}\x{2029}"
_SPACES = r"\t\n\x{b}\x{c}\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACES}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_HEX = {"x": 2, "u": 4}


def literal(text: str) -> str:
    """An expression that matches `text` and nothing else."""
    return "".join(map(_code, text))


def translate(pattern: str, *, whole: bool) -> str:
    """`pattern` for the library; raises Refused for what is not known to mean the same.

    `whole`: the text must match from end to end, so that `^` and `$` may stand there and mean nothing; else the pattern
    is searched for, as JSON Schema's `pattern` is, and they are kept.
    """
    return _Parser(pattern, whole).parse()


def _code(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


class _Parser:
    def __init__(self, pattern: str, whole: bool) -> None:
        self._pattern = pattern
        self._whole = whole
        self._at = 0

    def parse(self) -> str:
        text, _ = self._alternatives(0)
        if self._at < len(self._pattern):
            raise self._refused("an unmatched )")
        return text

    # Each part returns what to write for it, and the greatest product of repetition counts inside.

    def _alternatives(self, depth: int) -> tuple[str, int]:
        if depth > MAX_GROUPS_DEEP:
            raise self._refused(f"groups nested more than {MAX_GROUPS_DEEP} deep")
        parts, repeats = [], 1
        while True:
            text, inner = self._sequence(depth)
            parts.append(text)
            repeats = max(repeats, inner)
            if not self._take("|"):
                return "|".join(parts), repeats

    def _sequence(self, depth: int) -> tuple[str, int]:
        parts: list[str] = []
        repeats = 1
        while self._peek() not in ("", "|", ")"):
            if self._peek() in ("^", "$"):
                parts.append(self._anchor(depth, first=not parts))
                continue
            text, inner = self._atom(depth)
            suffix, most = self._quantifier()
            if inner * most > MAX_REPEATS:
                raise self._refused(f"nested repetitions of more than {MAX_REPEATS} in all")
            parts.append(text + suffix)
            repeats = max(repeats, inner * most)
        return "".join(parts), repeats

    def _anchor(self, depth: int, *, first: bool) -> str:
        anchor = self._next()
        if not self._whole:
            return anchor
        if depth or not (first if anchor == "^" else self._peek() in ("", "|")):
            raise self._refused(f"{anchor} inside an expression that matches whole texts")
        return ""

    def _atom(self, depth: int) -> tuple[str, int]:
        character = self._next()
        if character == "(":
            self._group_head()
            text, repeats = self._alternatives(depth + 1)
            if not self._take(")"):
                raise self._refused("an unclosed (")
            return f"(?:{text})", repeats
        if character == "[":
            return self._class(), 1
        if character == ".":
            return f"[^{_LINE_ENDS}]", 1
        if character == "\\":
            text, single = self._escape()
            return (text if single is not None else f"[{text}]"), 1
        if character in "*+?{":
            raise self._refused(f"{character} with nothing to repeat (write \\{character} for the character)")
        return _code(character), 1

    def _group_head(self) -> None:
        if not self._take("?"):
            return
        if self._take(":"):
            return
        self._take("P")
        if self._take("<") and self._peek() not in ("=", "!", ""):
            name = self._until(">")
            if name.isidentifier():
                return
        raise self._refused("a group other than (...), (?:...) and (?<name>...)")

    def _class(self) -> str:
        negated = self._take("^")
        parts: list[str] = []
        while not self._take("]"):
            low_text, low = self._class_member()
            if self._peek() != "-" or self._pattern[self._at + 1 : self._at + 2] in ("]", ""):
                parts.append(low_text)
                continue
            self._next()
            high_text, high = self._class_member()
            if low is None or high is None or low > high:
                raise self._refused("a range in [...] that does not go up from one character to another")
            parts.append(f"{low_text}-{high_text}")
        if not parts:
            raise self._refused("an empty [...]")
        return f"[{'^' * negated}{''.join(parts)}]"

    def _class_member(self) -> tuple[str, str | None]:
        character = self._next()
        if character == "":
            raise self._refused("an unclosed [")
        return self._escape() if character == "\\" else (_code(character), character)

    def _escape(self) -> tuple[str, str | None]:
        """What follows a backslash, as it may stand inside [...]; and the character, if it is one."""
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character], None
        if character.lower() in _CLASSES and character:
            return f"[^{_CLASSES[character.lower()]}]", None
        if character in ("p", "P") and self._take("{"):
            name = self._until("}")
            if name.isalpha() and name.isascii() and len(name) <= 2:
                return f"\\{character}{{{name}}}", None
            raise self._refused("\\p{...} of anything but a general category")
        if character in _HEX:
            return self._hexadecimal(_HEX[character])
        if character == "0" and self._peek().isdigit():
            raise self._refused("an octal escape")
        found = _CONTROLS.get(character, character)
        if character == "" or (found == character and (character.isalnum() or not character.isascii())):
            raise self._refused(f"\\{character}")
        return _code(found), found

    def _hexadecimal(self, digits: int) -> tuple[str, str | None]:
        if digits == 4 and self._take("{"):
            text = self._until("}")
        else:
            text = self._pattern[self._at : self._at + digits]
            self._at += digits
            if len(text) < digits:
                text = ""
        if not text or len(text) > 6 or any(digit not in "0123456789abcdefABCDEF" for digit in text):
            raise self._refused("an escape without hexadecimal digits")
        number = int(text, 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise self._refused("an escape that is no character")
        return _code(chr(number)), chr(number)

    def _quantifier(self) -> tuple[str, int]:
        """The repetition that follows, and its count as far as it is unrolled. Lazy ones match the same texts."""
        character = self._peek()
        if character in ("*", "+", "?") and character:
            self._next()
            text, most = character, 1
        elif character == "{":
            self._next()
            text, most = self._counts()
        else:
            return "", 1
        self._take("?")
        if self._peek() in ("*", "+", "{") and self._peek():
            raise self._refused("a repetition of a repetition")
        return text, most

    def _counts(self) -> tuple[str, int]:
        low, comma, high = self._until("}").partition(",")
        if not (low.isdecimal() and low.isascii() and (not high or (high.isdecimal() and high.isascii()))):
            raise self._refused("a { that is no count such as {2} or {2,5} (write \\{ for the character)")
        if len(low) > 6 or len(high) > 6 or (high and int(high) < int(low)):
            raise self._refused("a count that is too large or goes down")
        return f"{{{low}{comma}{high}}}", max(1, int(low), int(high or 0))

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        character = self._peek()
        self._at += 1
        return character

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _until(self, end: str) -> str:
        stop = self._pattern.find(end, self._at)
        if stop < 0:
            raise self._refused(f"a missing {end}")
        text = self._pattern[self._at : stop]
        self._at = stop + 1
        return text

    def _refused(self, what: str) -> Refused:
        return Refused(f"the regular expression has {what}, near character {min(self._at, len(self._pattern))}")
