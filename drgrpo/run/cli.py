"""A command line from a dataclass: one flag per field, its docstring as help."""

import argparse
import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from drgrpo.types import UserError, check_name, is_utf8, world_size


class Parser(argparse.ArgumentParser):
    """One flag per field of the dataclass `cls`. A mistake is a `UserError` that offers the nearest
    flag. `refused` maps flags that people expect to the reason why there are none."""

    def __init__(self, cls: type, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, usage="%(prog)s [--field value ...]", **kwargs)
        self.refused: dict[str, str] = {}
        docs, groups, types = field_docs(cls), field_groups(cls), get_type_hints(cls)
        sections: dict[str, Any] = {}
        for field in fields(cls):
            title = groups.get(field.name, "what")
            section = sections.setdefault(title, None) or self.add_argument_group(title)
            sections[title] = section
            default = "" if field.default in (MISSING, "") else f" ({field.default})"
            section.add_argument(
                f"--{flag(field.name)}",
                help=docs[field.name].replace("%", "%%") + default,
                required=field.default is MISSING,
                default=argparse.SUPPRESS,
                **value_options(types[field.name]),
            )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: list[str] | None = None) -> dict[str, Any]:
        """The fields that are given on the command line, by name."""
        given, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if name in self.refused:
                raise UserError(f"{name} does not exist: {self.refused[name]}")
            if not name.startswith("-"):
                raise UserError(f"unexpected argument {name!r}; write options as --name value")
            check_name("option", name, [o for o in self._option_string_actions if o[:2] == "--"])
        return vars(given)


def value_options(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type. A bool flag alone means true."""
    if kind is bool:
        return {"type": parse_bool, "metavar": "BOOL", "nargs": "?", "const": True}
    if get_origin(kind) is Literal:
        return {"metavar": "{" + ",".join(get_args(kind)) + "}"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def check_choices(settings: Any) -> None:
    """UserError if a `Literal` field of a dataclass instance holds something else."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal:
            check_name(f"--{flag(name)}", getattr(settings, name), get_args(kind))


def check_texts(settings: Any) -> None:
    """UserError if a text field of a dataclass instance holds what UTF-8 cannot."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str) and not is_utf8(value):
            raise UserError(f"--{flag(field.name)} {value!r} is not UTF-8; write it in UTF-8")


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def flag(name: str) -> str:
    return name.replace("_", "-")


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it. A dataclass field has no docstring at run time."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, doc in pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = ast.literal_eval(doc.value)
    return docs


def field_groups(cls: type) -> dict[str, str]:
    """Field name -> the comment line above its group."""
    groups, title = {}, "run"
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            title = line[6:]
        elif match := re.match(r"    (\w+): \w+", line):
            groups[match[1]] = title
    return groups


@contextmanager
def user_errors() -> Iterator[None]:
    """A `UserError` becomes one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def hard_exit() -> Iterator[None]:
    """An exception ends one of several processes at once, after its traceback.

    An ordinary exit runs vLLM's and NCCL's cleanup first. Both wait for the other processes, which
    wait for this one in a collective. The exit closes this process's connections, and that ends the
    collectives of the others with an exception too."""
    try:
        yield
    except BaseException as error:
        if world_size() == 1:
            raise
        status = 1
        if isinstance(error, SystemExit):
            status = int(error.code or 0)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
