"""From what the user typed to a declaration: `ttt_mlp`, `TTTMLP`, `my_layers.py:Mine` or `my_layers.py`.

Goes in: a library name or a file; comes out: the `Variant` class and a size for each of its dims. Whatever is
wrong with the name or the file becomes a `LoadError` that says what was found and what to type instead.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import tttc.library
from tttc.declare.read import read_declaration
from tttc.declare.variant import Variant
from tttc.errors import SourceLine, TTTCError
from tttc.networks.end_to_end import EndToEnd
from tttc.verification.comparison import default_dims

DEFAULT_WIDTH = 64


class LoadError(TTTCError):
    """A variant that is not where the user said it is."""


def load_variant(name: str) -> type[Variant]:
    """The declaration that `name` stands for: a library name however spelt, `file.py:Class`, or `file.py`."""
    file, _, class_name = name.partition(":")
    if file.endswith(".py") or class_name or "/" in file:
        return _from_file(Path(file).expanduser(), class_name)
    return _from_library(name)


def load_network(name: str) -> EndToEnd | None:
    """The network that `file.py:name` stands for, or a function of no arguments there that makes one; None if the name
    is of something else.
    """
    file, _, own = name.partition(":")
    if not own or not Path(file).expanduser().is_file():
        return None
    found = getattr(_import_file(Path(file).expanduser()), own, None)
    if callable(found) and not isinstance(found, type | EndToEnd):
        found = found()
    return found if isinstance(found, EndToEnd) else None


def library_variants() -> dict[str, type[Variant]]:
    """The ready declarations by name, in the library's own order."""
    exported = {name: getattr(tttc.library, name) for name in tttc.library.__all__}
    return {name: found for name, found in exported.items() if isinstance(found, type) and issubclass(found, Variant)}


def full_dims(variant: type[Variant], given: Mapping[str, int]) -> dict[str, int]:
    """A size for every dim of the declaration: as given, otherwise D = 64, F = 4 D and all others D."""
    declared, _ = read_declaration(variant)
    unknown = [dim for dim in given if dim not in declared.dims]
    if unknown:
        raise LoadError(
            f"variant `{variant.__name__}` has no dim {', '.join(unknown)}.\n  Its dims are {', '.join(declared.dims)}."
        )
    return default_dims(declared, given.get("D", DEFAULT_WIDTH)) | dict(given)


def _from_library(name: str) -> type[Variant]:
    variants = library_variants()
    by_spelling = {_spelling(known): variant for known, variant in variants.items()}
    found = by_spelling.get(_spelling(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(_spelling(name), by_spelling, n=3, cutoff=0.5)
    if near:
        remedy = f"Did you mean {' or '.join(by_spelling[spelling].__name__ for spelling in near)}?"
    else:
        remedy = f"The library has {', '.join(variants)}."
    raise LoadError(
        f"no ready variant is named `{name}`.\n  {remedy} A declaration of your own is given as file.py:Class."
    )


def _spelling(name: str) -> str:
    """`ttt_mlp`, `TTT-MLP` and `TTTMLP` are one name."""
    return name.replace("_", "").replace("-", "").casefold()


def _from_file(path: Path, class_name: str) -> type[Variant]:
    if not path.is_file():
        raise LoadError(f"there is no file {path}{_near_file(path)}")
    module = _import_file(path)
    declared = _declared_in(module)
    if not class_name and len(declared) != 1:
        raise LoadError(f"{path} does not say by itself which variant is meant.\n  {_choice(path, declared)}")
    class_name = class_name or declared[0]
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Variant):
        return found
    if found is not None:
        raise LoadError(
            f"`{class_name}` in {path} is not a variant.\n  It must be a class that derives from tttc.Variant."
        )
    raise LoadError(f"{path} has no class `{class_name}`.\n  {_choice(path, declared)}")


def _near_file(path: Path) -> str:
    beside = sorted(other.name for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.75)
    if near:
        return f".\n  Did you mean {path.with_name(near[0])}?"
    return ".\n  Give a file that declares a variant, as file.py:Class; `tttc list` shows the ready ones."


def _import_file(path: Path) -> ModuleType:
    """Run the user's file as a module; the files beside it can be imported, as under `python file.py`."""
    resolved = path.resolve()
    # The digest keeps two files of one name apart, and a user's torch.py from replacing torch.
    name = f"tttc_file_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file.\n  Give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where `inspect` looks for the source of a class
    sys.path.append(str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except TTTCError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError(_import_failure(path, resolved, error)) from error
    finally:
        sys.path.remove(str(resolved.parent))
    return module


def _import_failure(path: Path, resolved: Path, error: BaseException) -> str:
    """What stopped the import, with the innermost line of the user's own file on the way there."""
    where = _line_in(resolved, error)
    if isinstance(error, SyntaxError):
        where = SourceLine(error.filename, error.lineno) if error.filename and error.lineno else None
        what, remedy = f"is not valid Python: {error.msg}.", "Correct the line."
    elif isinstance(error, SystemExit):
        remedy = 'Put what it runs below `if __name__ == "__main__":`.'
        what = "ends the program when it is imported."
    elif isinstance(error, ModuleNotFoundError):
        what, remedy = f"needs the module `{error.name}`.", "Install it, or correct the import."
    else:
        what = f"cannot be imported: {type(error).__name__}: {error}"
        remedy = f"`python {path}` shows the whole traceback; so does TTTC_DEBUG=1."
    place = f"\n{where.shown()}" if where else ""
    return f"{path} {what}{place}\n  {remedy}"


def _line_in(file: Path, error: BaseException) -> SourceLine | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return SourceLine(str(file), lines[-1]) if lines and lines[-1] else None


def _declared_in(module: ModuleType) -> list[str]:
    """Names of the variants that the file declares; those it only imports count if it has no other."""
    names = [
        name
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, Variant) and found is not Variant
    ]
    own = [name for name in names if vars(module)[name].__module__ == module.__name__]
    return own or names


def _choice(path: Path, declared: list[str]) -> str:
    if not declared:
        return "It declares no variant: a class that derives from tttc.Variant."
    return f"It declares {', '.join(declared)}: give one as {path}:{declared[0]}."
