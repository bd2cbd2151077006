"""mkdocs hook: fills the API reference in from docstrings when the site is built.

A line ``<!-- api: MODULE -->`` of a page becomes the module's public names, each with its signature and docstring;
``<!-- api: MODULE NAME ... -->`` those names alone. Sources are parsed, not imported: the site builds without torch.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
APART = ("integrations", "csrc_triton")
"""Packages that are installed below torch_prunepath, but lie beside it."""

MARKER = re.compile(r"^<!-- api: ([\w.]+)((?: \w+)*) -->$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples?):$")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
ITEM = re.compile(r"^(\*{0,2}\w[\w., ]*?): (.*)$")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Module


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the markers of a page; mkdocs calls it."""
    return MARKER.sub(lambda match: render(match[1], match[2].split()), markdown)


# --- what is public, and where it is defined --------------------------------------------------------------------------


def source_of(module: str) -> Path:
    """The file of a module of the package."""
    parts = module.split(".")
    path = ROOT.joinpath(*(parts[1:] if len(parts) > 1 and parts[1] in APART else parts))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parse(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """``__all__``, or what the module defines under a name without underscore and documents."""
    tree = parse(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and _names_of(node) == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [name for name, _, doc in _definitions(tree) if doc and not name.startswith("_")]


def find(module: str, name: str) -> tuple[Definition, str]:
    """The definition of a module's name, wherever it is imported from, and its docstring ("" if it has none).

    Raises:
        LookupError: if there is none in this package.
    """
    tree = parse(module)
    for defined, node, doc in _definitions(tree):
        if defined == name:
            return node, doc
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("torch_prunepath"):
            continue
        for alias in statement.names:
            if (alias.asname or alias.name) != name:
                continue
            submodule = f"{statement.module}.{alias.name}"
            if source_of(submodule).is_file():
                return (tree := parse(submodule)), ast.get_docstring(tree) or ""
            return find(str(statement.module), alias.name)
    raise LookupError(f"{module} has no {name}")


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition, str]]:
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            for name in _names_of(node):
                yield name, node, inspect.cleandoc(text) if isinstance(text, str) else ""


def _names_of(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def render(module: str, names: Sequence[str] = ()) -> str:
    """Names of a module, or all its public ones, as Markdown."""
    return "\n\n".join(_render(module, name) for name in names or public_names(module))


def _render(module: str, name: str) -> str:
    node, doc = find(module, name)
    parts = [f'<a id="{module}.{name}"></a>', f"### {name}"]
    if isinstance(node, ast.Module):
        return "\n\n".join([*parts, f"A module, `{module}.{name}`. {markdown_of(doc)}"])
    parts += [_code(signature(node, f"{module}.{name}")), markdown_of(doc)]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            text = ast.get_docstring(method) if isinstance(method, ast.FunctionDef) else None
            if isinstance(method, ast.FunctionDef) and text and not method.name.startswith("_"):
                parts += [f"#### {name}.{method.name}", _code(signature(method, method.name)), markdown_of(text)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def signature(node: Definition, name: str) -> str:
    """How a function is called or a class is built, a parameter a line where one line is too short."""
    if isinstance(node, ast.ClassDef):
        return _class_signature(node, name)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.unparse(node)
    if any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list):
        return name + (f": {ast.unparse(node.returns)}" if node.returns else "")
    return _wrapped(name, _parameters(node), f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _class_signature(node: ast.ClassDef, name: str) -> str:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return _wrapped(f"class {name}", _parameters(method), "")
    if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        fields = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
        return _wrapped(f"class {name}", fields, "")
    return f"class {name}"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found = [_parameter(each, default) for each, default in zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        found = found[1:]
    if given.vararg is not None:
        found.append("*" + _parameter(given.vararg, None))
    elif given.kwonlyargs:
        found.append("*")
    found += [_parameter(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        found.append("**" + _parameter(given.kwarg, None))
    return found


def _parameter(node: ast.arg, default: ast.expr | None) -> str:
    text = node.arg if node.annotation is None else f"{node.arg}: {ast.unparse(node.annotation)}"
    return text if default is None else f"{text}{' = ' if node.annotation else '='}{ast.unparse(default)}"


def _wrapped(name: str, parameters: list[str], result: str) -> str:
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def markdown_of(doc: str) -> str:
    """A docstring in Google's style as Markdown."""
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        header = SECTION.match(line.replace("::", ":"))
        if header:
            blocks.append((header[1], []))
        elif line and not line.startswith(" ") and blocks[-1][0]:
            blocks.append(("", [line]))
        else:
            blocks[-1][1].append(line)
    return "\n\n".join(filter(None, (_block(title, lines) for title, lines in blocks)))


def _block(title: str, lines: list[str]) -> str:
    text = inspect.cleandoc("\n".join(["", *lines])).strip()
    if not text:
        return ""
    if title.startswith("Example"):
        return _code(text)
    if not title:
        return _paragraphs(text)
    body = _items(text) if title in ("Args", "Attributes", "Raises") else _linked(text)
    return f"**{title}**\n\n{body}"


def _paragraphs(text: str) -> str:
    # What is indented below a paragraph is code already.
    return "\n".join(line if line.startswith("    ") else _linked(line) for line in text.splitlines())


def _items(text: str) -> str:
    found: list[str] = []
    for line in text.splitlines():
        item = None if line.startswith(" ") else ITEM.match(line)
        if item:
            found.append(f"- `{item[1]}`: {_linked(item[2])}")
        elif found:
            found[-1] += f"\n  {_linked(line.strip())}"
        else:
            found.append(_linked(line))
    return "\n".join(found)


def _linked(text: str) -> str:
    return ROLE.sub(lambda role: f"`{role[1]}`", text)
