"""Rows of text from jsonl files, csv tables, lines with separators and files of documents.

Lines end with a line feed, a carriage return or both, also mixed in one file, and with nothing else. Only quotes around a whole
field count as quotes. In some files half of the fields are quoted and the other half hold bare quotes, at which a csv reader
would swallow lines.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.typed import Names, RelativePath
from vismt.data.copies import digest_files, fix, read_text, shown_path
from vismt.data.set_entries import DELIMITERS
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind
from vismt.data.texts.text_set import LINE_ENDS, TextRow, TextRows, TextSource, check_encoding, json_lines, json_list

_FORMS = ("jsonl", "csv", "lines", "documents")
NAMED = ("jsonl", "csv")  # forms whose files name the fields


@source_kind("text")
@dataclass(frozen=True, kw_only=True)
class TextFilesSource(RootedSource, TextSource):
    """Rows of text, in one file for each split.

    Attributes:
        files: File of each split.
        fields: Names of the fields of a row. [] takes all fields, if the files name them.
        form: Form of the files. "jsonl": an object a line, or in a .json file a list of objects, which must have the `fields`.
            "csv": a table with the names of its columns in the first line, and tabs between columns in a .tsv file. "lines":
            the `fields` of a line with the `separators` between them. Quotes around a whole field are removed. "documents": the
            one field holds the text from one match of the regular expression `starts` to the next.
        separators: Texts between fields, one fewer than `fields`, applied in turn from the left.
        extract: Regular expressions by field, which must match all of the field's text. The named groups become fields too, if
            they take part in the match.
        encoding: Encoding of the files.
    """

    files: dict[str, RelativePath]
    fields: list[str] = field(default_factory=list)
    form: Annotated[str, Names(_FORMS, only=True)] = "jsonl"
    separators: list[str] = field(default_factory=list)
    starts: str | None = None
    extract: dict[str, str] = field(default_factory=dict)
    encoding: Annotated[str, check_encoding] = "utf-8"

    def check(self, where: str) -> None:
        super().check(where)
        self.check_per_split(where, "files", self.files)
        wanted = len(self.fields) - 1 if self.form == "lines" else 0
        unique = len(set(self.fields)) == len(self.fields) and (bool(self.fields) or self.form in NAMED)
        if not unique or len(self.separators) != wanted or "" in self.separators:
            raise UserError(
                f"{where}: fields {self.fields} of form '{self.form}' need {wanted} separators and no name twice."
            )
        documents = self.form == "documents"
        if documents != (self.starts is not None) or (documents and len(self.fields) > 1):
            raise UserError(f"{where}: form 'documents' needs 'starts' and one field; 'starts' is for no other form.")
        self._check_patterns(where)

    def _check_patterns(self, where: str) -> None:
        patterns = {**self.extract, "starts": self.starts} if self.starts else self.extract
        for key, pattern in patterns.items():
            try:
                groups = re.compile(pattern).groupindex
            except re.error as error:
                raise UserError(f"{where}: {key}: '{pattern}' is not a regular expression: {error}.") from error
            if key != "starts" and (key not in self.fields or not groups or set(groups) & set(self.fields)):
                raise UserError(f"{where}: extract: '{key}' must be a field and its groups named like no other field.")

    def list_files(self, base: Path) -> Files:
        return file_groups(base, self.files.values())

    def read_rows(self, card: Card, base: Path, splits: Sequence[str]) -> TextRows:
        hashed = [(self.files[name], base / self.files[name]) for name in splits]
        settings = repr((self.form, self.fields, self.separators, self.starts, self.extract, self.encoding))
        parts = {name: self._read(card, path) for name, (_, path) in zip(splits, hashed, strict=True)}
        rows = {name: {str(number): row for number, row in enumerate(part)} for name, part in parts.items()}
        return TextRows(rows, lambda: f"{digest_files(hashed).sha256}:{settings}")

    def _read(self, card: Card, path: Path) -> list[TextRow]:
        shown = shown_path(path)
        text = read_text(card, path, self.encoding)
        if self.form == "documents":
            starts = [match.start() for match in re.finditer(self.starts or "", text)]
            if not starts or text[: starts[0]].strip():
                raise UserError(f"{shown}: no document starts at the beginning ('{self.starts}'). {fix(card)}")
            rows = [{self.fields[0]: text[a:b].strip()} for a, b in zip(starts, [*starts[1:], len(text)])]
            return [self._extracted(row, f"{shown}: document {number}") for number, row in enumerate(rows, 1)]
        if self.form == "csv":
            return self._parse_table(text, path, shown)
        if self.form == "jsonl":
            parsed = []
            for where, values in (json_list if path.suffix == ".json" else json_lines)(text, shown):
                if not values or not set(self.fields) <= set(values):
                    raise UserError(f"{where}: is not an object with {', '.join(self.fields) or 'a field'}.")
                parsed.append(self._extracted({name: values[name] for name in self.fields or values}, where))
            return parsed
        lines = ((f"{shown}: line {number}", line) for number, line in enumerate(LINE_ENDS.split(text), 1))
        return [self._extracted(self._parse_fields(line, where), where) for where, line in lines if line.strip()]

    def _parse_table(self, text: str, path: Path, shown: str) -> list[TextRow]:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS.get(path.suffix, ","))
        rows = []
        try:
            columns = list(table.fieldnames or ())
            require_known(f"{shown}: no column", self.fields, columns)
            for row in table:
                where = f"{shown}: line {table.line_num}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{where}: does not have the {len(columns)} columns of the first line; put quotes around texts with a "
                        "separator."
                    )
                rows.append(self._extracted({name: row[name] for name in self.fields or columns}, where))
        except csv.Error as error:
            raise UserError(f"{shown}: line {table.line_num}: cannot be read as a table: {error}.") from error
        return rows

    def _parse_fields(self, line: str, where: str) -> TextRow:
        values, rest = [], line
        for separator in self.separators:
            value, separated, rest = rest.partition(separator)
            if not separated:
                raise UserError(
                    f"{where}: has no {shown_value(separator)} after '{value[:40]}'; it must hold {', '.join(self.fields)}."
                )
            values.append(value)
        values.append(rest)
        if "\t" in self.separators and "\t" in rest:
            raise UserError(f"{where}: has more than the fields {', '.join(self.fields)}.")
        return {name: _unquoted(value) for name, value in zip(self.fields, values, strict=True)}

    def _extracted(self, row: TextRow, where: str) -> TextRow:
        for name, pattern in self.extract.items():
            match = re.fullmatch(pattern, str(row[name]))
            if match is None:
                raise UserError(
                    f"{where}: '{name}' ({shown_value(str(row[name])[:60])}) does not fit the card's pattern '{pattern}'."
                )
            row = {**row, **{group: value for group, value in match.groupdict().items() if value is not None}}
        return row


def _unquoted(value: str) -> str:
    whole = len(value) > 1 and value[0] == value[-1] == '"'
    return (value[1:-1].replace('""', '"') if whole else value).strip()
