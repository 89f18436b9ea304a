"The dialect of exported code: lines of at most 110 characters, and one statement a line."
import ast
import re
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "bas_repro"
MODULES = sorted(path for path in LIBRARY.glob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
LONGEST = 110  # characters
BODIES = ("body", "orelse", "finalbody")  # lists of statements


@pytest.fixture(params=MODULES, ids=lambda path: path.name)
def source(request):
    return request.param.read_text(encoding="utf-8")


def names_block(tree):
    "The lines of __all__, which nbdev writes."
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    lists = [node for node in assignments if ast.unparse(node.targets[0]) == "__all__"]
    return {line for node in lists for line in range(node.lineno, node.end_lineno + 1)}


def test_lines_are_short(source):
    nbdevs = names_block(ast.parse(source))
    lines = {number: line for number, line in enumerate(source.splitlines(), 1) if number not in nbdevs}
    long = {number: line for number, line in lines.items() if len(line) > LONGEST}
    assert not long


def test_one_statement_a_line(source):
    "No statement begins on the line of another, nor on that of the `if`, `for` or `def` that it is in."
    crowded = []
    for parent in ast.walk(ast.parse(source)):
        before = last_of_header(parent)
        for statement in (one for name in BODIES for one in inner(parent, name)):
            if first_line(statement) <= before:
                crowded.append((first_line(statement), ast.unparse(statement)[:60]))
            before = statement.end_lineno
    assert not crowded


def test_no_statement_stands_behind_else(source):
    assert re.findall(r"^ *(?:else|try|finally): *[^\s#].*$", source, re.MULTILINE) == []


def inner(node, name):
    "The statements that are a part of a node; a lambda's and a conditional's are no list."
    found = getattr(node, name, [])
    return found if isinstance(found, list) else []


def last_of_header(node):
    "The line on which a compound statement begins; 0 for a module."
    return getattr(node, "lineno", 0)


def first_line(statement):
    "A statement's first line, its decorators included."
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(one.lineno for one in decorators)])
