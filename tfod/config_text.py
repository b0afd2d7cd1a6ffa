"""The text of a pipeline.config (protobuf text format): its `model { ... }` cut out and checked field by field.

Whatever else the file holds, however broken, is not read. Line numbers are the file's.
"""

import bisect
import collections
import difflib
import re

from commandline import UserError, decode_text

LARGEST = 200_000  # bytes; TFOD's own files have ten thousand at most
MOST_UNKNOWN = 20  # fields of a fork
# Strings (with a group if the closing quote is missing: to the end of the line), comments, punctuation, words. Brackets,
# commas and semicolons say nothing that matters here.
TOKEN = re.compile(r""""(?:\\.|[^"\\\n])*(?:"|())|'(?:\\.|[^'\\\n])*(?:'|())|#[^\n]*|[{}<>:]|[^\s{}<>:,;\[\]"'#]+""")
OPENING, CLOSING = {"{", "<"}, {"}", ">"}
NAME = re.compile(r"[A-Za-z_]\w*")
CURLY_QUOTES = re.compile("[\u201c\u201d\u201e\u2018\u2019]")
# What stands beside `model` in the file, never within it.
BESIDE_MODEL = {"train_config", "train_input_reader", "train_input_config", "eval_config", "eval_input_reader"}
BESIDE_MODEL |= {"eval_input_config", "graph_rewriter"}

# kind: a scalar's, or a message's; None: TFOD has this field, but it is not read. one_of: setting it clears the others.
Field = collections.namedtuple("Field", ["name", "kind", "default", "repeated", "one_of"])


def read_text(path):
    """Returns the text of the file at a Path. Raises UserError for what is no text file of a pipeline.config's size."""
    refusal = f"cannot read {path}: {{}}; --pipeline_config takes the model's pipeline.config"
    if path.exists() and not path.is_file():
        raise UserError(refusal.format("it is not a file"))
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(refusal.format(error.strerror)) from error
    if len(data) > LARGEST:
        raise UserError(refusal.format("it is too large for one"))
    try:
        return decode_text(data, errors="replace").replace("\ufeff", "")
    except ValueError as error:
        raise UserError(refusal.format(error)) from error


class ConfigText:
    """The text of a file and where its models are; `model {`, `model: {` and `model <` begin one, wherever they stand."""

    def __init__(self, path, text, fields):
        """fields: {kind of message: {name: Field}}. Raises UserError where a model does not end where it should."""
        self.path, self.text, self.fields = path, text, fields
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._tokens = [token for token in TOKEN.finditer(text) if not token[0].startswith("#")]
        self._closing = {}  # {index of an opening brace among the tokens: that of its closing one}, within models
        self.models = []  # the indices of their opening braces
        self._find_models()

    def _find_models(self):
        opened, ended = [], False
        for i, token in enumerate(self._tokens):
            if token[0] in CLOSING:
                if opened:
                    self._closing[opened.pop()] = i
                    ended = not opened
            elif token[0] in OPENING:
                if opened:
                    opened.append(i)
                elif "model" in (self._word(i - 1), self._word(i - 2) if self._word(i - 1) == ":" else None):
                    opened.append(i)
                    self.models.append(i)
            elif opened and token.lastindex:
                raise self.error(token, f"{token[0][:60]}: a string without its closing quote")
            elif opened and token[0] in BESIDE_MODEL and self._word(i + 1) in OPENING | {":"}:
                raise self.error(token, f"{token[0]} stands within `model {{`: a }} is missing above it")
            elif not opened:
                if ended and any(token[0] in names for names in self.fields.values()):
                    raise self.error(token, f"{token[0]} stands outside `model {{ }}`: a }} too many above it")
                ended = False
        if opened:
            raise self.error(self._tokens[opened[0]], "the `model {` that begins here is not closed: a } is missing")

    def _word(self, i):
        return self._tokens[i][0] if 0 <= i < len(self._tokens) else ""

    def line(self, token):
        return bisect.bisect_left(self._newlines, token.start()) + 1

    def error(self, where, what):
        """Returns a UserError. where: a line's number or a token in it."""
        line = where if isinstance(where, int) else self.line(where)
        if CURLY_QUOTES.search(self.text.split("\n")[line - 1]):
            what = 'curly quotes; write straight ones (")'
        return UserError(f"{self.path}: line {line}: {what}")

    def contents(self, kind, loose):
        """Checks the fields of the models. Returns the text with all blanked but those that are read, lines as they were.

        kind: of the models' message. loose: kinds of messages whose unknown fields are left out with a warning; in any
        other they are an error, as is everywhere one that seems to be misspelt. Several models come one after the other,
        to be merged. Raises UserError for text without the form of fields. Sets `problem`, a UserError or None, for a
        field that cannot be there: the model may first be refused for what it is. Sets `warnings`.
        """
        self.problem, self.warnings = None, []
        if self.models[1:]:
            lines = ", ".join(str(self.line(self._tokens[start])) for start in self.models[:9])
            self.warnings.append(
                f"{len(self.models)} models (lines {lines}) are merged: the last value counts, as in TFOD"
            )
        read, unread, unknown, repeated = [], [], [], []
        messages = [(start, kind, "model") for start in self.models]
        for start, kind, place in messages:  # grows as it goes
            end = self._closing[start]
            if place == "model":
                read.append((self._tokens[start].end(), self._tokens[end].start()))
            seen = set()
            for first, value, stop in self._fields(start + 1, end):
                token = self._tokens[first]
                field = self.fields[kind].get(token[0])
                if field is None:
                    self.problem = self.problem or self._unknown(token, kind, place, len(unknown), loose)
                    unknown.append(token)
                if field is None or field.kind is None:
                    unread.append((token.start(), self._tokens[stop].start()))
                    continue
                if seen and (field.one_of or field.name in seen) and not field.repeated:
                    repeated.append(token)
                seen.add(field.name)
                if value in self._closing and self.fields.get(field.kind):
                    messages.append((value, field.kind, field.name))
                elif value in self._closing and field.kind in self.fields:  # only that it is there is read
                    unread.append((self._tokens[value].end(), self._tokens[stop - 1].start()))
        self._remember(unknown, "TFOD has no such field there; it is left out")
        self._remember(repeated, "another value was given above; the last one counts, as in TFOD")
        return self._blanked(read, unread)

    def _fields(self, begin, end):
        """Yields (index of the name, of the value, behind the value) of each field between these tokens of a message."""
        i = begin
        while i < end:
            token, word = self._tokens[i], self._tokens[i][0]
            if not NAME.fullmatch(word):
                raise self.error(token, f"{word[:60]!r} is not the name of a field")
            colon = self._word(i + 1) == ":"
            value = stop = i + 1 + colon
            while stop in self._closing:
                stop = self._closing[stop] + 1
            if stop == value:
                if not colon:
                    raise self.error(token, f"{word[:60]!r} stands alone: neither a value nor a message follows")
                if value == end or self._word(value) == ":" or self._word(value + 1) in OPENING | {":"}:
                    raise self.error(token, f"{word[:60]} has no value")
                stop = value + 1
                # The rest of a list, or of a string in parts.
                while stop < end and stop not in self._closing and not NAME.match(self._word(stop)):
                    stop += 1
            yield i, value, stop
            i = stop

    def _unknown(self, token, kind, place, count, loose):
        """Returns a UserError for a field that its message does not have; None if it may be a fork's own."""
        if count > MOST_UNKNOWN:
            return self.error(token, f"more than {MOST_UNKNOWN} fields that TFOD does not have; is it TFOD's?")
        what = f"TFOD's {place} has no field {token[0][:60]}"
        near = difflib.get_close_matches(token[0].lower(), self.fields[kind], 1, 0.9 if kind in loose else 0.6)
        if any(token[0] in names for names in self.fields.values()):
            return self.error(token, f"{what}; is a brace missing or one too many above it?")
        if near:
            return self.error(token, f"{what}; did you mean {near[0]}?")
        return None if kind in loose else self.error(token, f"{what}; what it changes is not supported")

    def _remember(self, tokens, what):
        if tokens:
            first = min(tokens, key=re.Match.start)
            more = f" (and {len(tokens) - 1} more such)" if tokens[1:] else ""
            self.warnings.append(f"line {self.line(first)}: {first[0][:60]}: {what}{more}")

    def _blanked(self, read, unread):
        """The text in the spans `read` without the spans `unread` that lie within them."""
        kept, position = [], 0
        edges = [0, *(edge for span in read for edge in span), len(self.text)]
        blanks = list(zip(edges[::2], edges[1::2], strict=True)) + unread
        for start, stop in sorted(blanks):
            kept += [self.text[position:start], re.sub(r"[^\n]", " ", self.text[start:stop])]
            position = stop
        return "".join(kept)
