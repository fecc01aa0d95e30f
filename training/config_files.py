"""Read a config from YAML files and the command line, and save it.

A YAML file is turned into flags, in front of the user's own, so that tyro checks both. Numbers stay text until then:
`1e-5` is a number although YAML 1.1 calls it a string. No torch is imported here, so a wrong option is refused at once.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import tyro
import yaml

Config = TypeVar("Config")


@dataclass(frozen=True)
class Option:
    """One option of a config class: its type, and whether it must be given."""

    type: Any
    required: bool

    @property
    def choices(self) -> tuple[Any, ...]:
        """The types of a union (`str | None`), else the one type."""
        is_union = typing.get_origin(self.type) in (typing.Union, types.UnionType)
        return typing.get_args(self.type) if is_union else (self.type,)

    @property
    def container(self) -> type | None:
        """tuple, list or dict when the option takes several values, else None."""
        origins = [typing.get_origin(choice) for choice in self.choices]
        return next((origin for origin in origins if origin in (tuple, list, dict)), None)

    @property
    def needs(self) -> str:
        return " or ".join(describe_type(choice) for choice in self.choices)


@dataclass(frozen=True)
class Setting:
    """What was given for an option: its texts, and where ("a.yaml:3", "the command line")."""

    values: tuple[str, ...]
    source: str


def load_config(
    cls: type[Config], argv: Sequence[str] | None = None, *, defaults: Mapping[str, Any] | None = None
) -> Config:
    """Reads a config from the command line and its YAML files; a wrong option ends the program with code 2.

    The command line wins over `--config` files, a later file over an earlier one, and all of them over `defaults`.

    Args:
        cls: a dataclass, whose fields may be dataclasses in turn.
        argv: arguments without the program's name; None takes the program's own.
        defaults: dotted names and values from the caller, as in {"model.path": "gpt2"}.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        return run_tyro(cls, ["--help"])
    options = list_options(cls)
    try:
        files, settings = read_arguments(argv, options)
        given = read_defaults(defaults or {}, options)
        for path in files:
            given |= read_yaml(path, options)
        given |= settings
        check_passwords(given)
        flags = [flag for name, setting in given.items() for flag in as_flags(name, setting, options[name])]
        missing = [name for name, option in options.items() if option.required and name not in given]
        if missing:
            needed = ", ".join(f"{name} ({options[name].needs})" for name in missing)
            example = f"--{missing[0]} on the command line, or in a YAML file named with --config"
            raise ValueError(f"missing: {needed}; give {example}")
    except ValueError as error:
        refuse(str(error))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), unlimited_columns():
            config = run_tyro(cls, flags)
    except SystemExit:
        refuse(explain_rejection(printed.getvalue(), given, options))
    sys.stderr.write(printed.getvalue())
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Writes `config` as YAML that `load_config` reads back equal."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not allow_unicode: PyYAML then writes U+0085 bare and reads it back as a space.
    text = yaml.safe_dump(as_plain(config), sort_keys=False)
    path.write_text(text, encoding="utf-8")


def refuse(message: str) -> NoReturn:
    """Ends the program with code 2 and a sentence for the user, printed once per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {hide_passwords(message)}\n(--help lists every option)", file=sys.stderr)
    raise SystemExit(2)


def list_options(cls: Any, prefix: str = "", has_default: bool = False) -> dict[str, Option]:
    """The options of a config class by their dotted names."""
    options: dict[str, Option] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        default = has_default or not (field.default is field.default_factory is dataclasses.MISSING)
        if dataclasses.is_dataclass(hint):
            options |= list_options(hint, name + ".", default)
        else:
            options[name] = Option(hint, required=not default)
    return options


def read_arguments(argv: Sequence[str], options: Mapping[str, Option]) -> tuple[list[str], dict[str, Setting]]:
    """The YAML files named in `argv`, and its other options. The --local_rank of DeepSpeed's launcher is dropped."""
    files: list[str] = []
    settings: dict[str, Setting] = {}
    arguments: list[tuple[str, list[str]]] = []
    for token in argv:
        if re.match(r"--[A-Za-z]", token):
            name, equals, value = token[2:].partition("=")
            arguments.append((name.replace("-", "_"), [value] if equals else []))
        elif arguments:
            arguments[-1][1].append(token)
        else:
            raise ValueError(f"{token!r} stands alone: write options as --name value")
    for name, values in arguments:
        if name == "config":
            if not values:
                raise ValueError("--config has no value: it needs a YAML file")
            files += values
        elif name != "local_rank":
            check_name(name, options)
            settings[name] = Setting(tuple(values), "the command line")
    return files, settings


def read_defaults(defaults: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Setting]:
    """The caller's own values as settings."""
    settings = {}
    for name, value in defaults.items():
        check_name(name, options)
        items = [text for pair in value.items() for text in pair] if isinstance(value, dict) else value
        values = items if isinstance(items, (list, tuple)) else [items]
        settings[name] = Setting(tuple(str(item) for item in values), "the defaults")
    return settings


def read_yaml(path: str, options: Mapping[str, Option]) -> dict[str, Setting]:
    """The options in a YAML file. The file is only parsed: no tag in it can create an object."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not a text file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {error}") from error
    settings: dict[str, Setting] = {}
    for name, setting in walk_yaml(root, "", path, options) if root else ():
        if name in settings:
            raise ValueError(f"{setting.source}: {name} is given twice, first in {settings[name].source}")
        settings[name] = setting
    return settings


def walk_yaml(node: yaml.Node, prefix: str, path: str, options: Mapping[str, Option]) -> Iterator[tuple[str, Setting]]:
    """Every option under a node, by its dotted name."""
    if not isinstance(node, yaml.MappingNode):
        line = f"{path}:{node.start_mark.line + 1}"
        raise ValueError(f"{line}: {prefix.rstrip('.') or 'the file'} needs `name: value` lines, not a single value")
    check_tag(node, f"{path}:{node.start_mark.line + 1}: {prefix.rstrip('.') or 'the file'}", "map")
    for key, value in node.value:
        source = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{source}: the name of an option needs to be text")
        name = prefix + key.value
        if name in options:
            yield name, Setting(tuple(yaml_texts(value, source, name, options[name])), source)
        elif any(option.startswith(name + ".") for option in options):
            if not is_null(value):
                yield from walk_yaml(value, name + ".", path, options)
        else:
            check_name(name, options, f"{source}: ")


def yaml_texts(node: yaml.Node, source: str, name: str, option: Option) -> list[str]:
    """The texts of an option's value: one for a scalar, several for a list, keys and values in turn for a mapping."""
    if is_null(node) and type(None) in option.choices:
        return ["None"]
    if option.container is None:
        children = [node]
    elif option.container is dict and isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif option.container is not dict and isinstance(node, yaml.SequenceNode):
        children = node.value
    else:
        form = "`name: value` lines, or {} for none" if option.container is dict else "a list, as in [a, b]"
        raise ValueError(f"{source}: {name} needs {form}")
    if option.container is not None:
        check_tag(node, f"{source}: {name}", "map", "seq")
    where = f"{source}: {name}" if option.container is None else f"{source}: a part of {name}"
    return [scalar_text(child, where, option) for child in children]


def scalar_text(node: yaml.Node, where: str, option: Option) -> str:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, yaml.ScalarNode) or is_null(node):
        found = "empty" if is_null(node) else "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        raise ValueError(f"{where} is {found}: it needs {option.needs}")
    check_tag(node, where, "str", "int", "float", "bool", "timestamp")
    if kind == "bool" and bool in option.choices:
        return str(node.value.lower() in ("true", "yes", "on"))
    return node.value


def check_tag(node: yaml.Node, where: str, *allowed: str) -> None:
    """Refuses a tag of other than plain YAML, such as !!python/object, which some readers make an object of."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in allowed:
        raise ValueError(f"{where} has the tag {node.tag}: only plain values are read")


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def check_name(name: str, options: Mapping[str, Option], where: str = "") -> None:
    """Refuses an option that does not exist, and names the nearest one that does."""
    if name in options:
        return
    members = [option for option in options if option.startswith(name + ".")]
    if members:
        raise ValueError(f"{where}{name} is a group of options: set its parts, such as {members[0]}")
    last = name.rpartition(".")[2]
    same = [option for option in options if option.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(name, same, 1, cutoff=0) or difflib.get_close_matches(name, options, 1)
    hint = f": did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"{where}there is no option {name}{hint}")


def check_passwords(given: Mapping[str, Setting]) -> None:
    """Refuses an address with a user name or password in it: a run writes its options into files that are passed on."""
    for name, setting in given.items():
        for value in setting.values:
            if hide_passwords(value) != value:
                raise ValueError(
                    f"{name} is {value!r} ({setting.source}), which holds a user name or password that the run's files "
                    "would show: leave it out; the hub's token goes into the variable HF_TOKEN"
                )


def hide_passwords(text: str) -> str:
    """`text` without what stands before the @ of an address: https://user:password@host."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


def as_flags(name: str, setting: Setting, option: Option) -> list[str]:
    """The arguments that give tyro a setting. The first value is tied on with `=`, so that it may begin with a dash."""
    if not setting.values:
        return [f"--{name}"]
    if option.container is None and len(setting.values) > 1:
        found = " ".join(setting.values)
        raise ValueError(f"{name} is {found!r} ({setting.source}): it needs one value, {option.needs}")
    for value in setting.values[1:]:
        if re.match(r"--?[^\d.]|--$", value):
            raise ValueError(f"{name} has the part {value!r} ({setting.source}): only the first may begin with a dash")
    return [f"--{name}={setting.values[0]}", *setting.values[1:]]


def run_tyro(cls: type[Config], flags: list[str]) -> Config:
    description = f"{inspect.getdoc(cls)}\n\n--config FILE reads options from a YAML file, and may be given again."
    description += " A later file wins over an earlier one, and the command line over all."
    settings = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(cls, args=flags, description=description, use_underscores=True, config=settings)


@contextlib.contextmanager
def unlimited_columns() -> Iterator[None]:
    """Keeps tyro from breaking its messages into lines, by the variable that it takes the terminal's width from."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def explain_rejection(printed: str, given: Mapping[str, Setting], options: Mapping[str, Option]) -> str:
    """One sentence from the box that tyro printed: what stands between its title and the first rule after that."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    rows = [line.strip("│ ") for line in plain.splitlines()[1:]]
    body = itertools.dropwhile(is_rule, rows)
    text = " ".join(itertools.takewhile(lambda row: not is_rule(row), body)).strip()
    named = re.search(r"--([\w.]+)", text) if not re.match(r"Error parsing [^-]", text) else None
    if named and named[1] in given:
        setting = given[named[1]]
        found = f"is {' '.join(setting.values)!r}" if setting.values else "has no value"
        return f"{named[1]} {found} ({setting.source}): it needs {options[named[1]].needs}"
    check = re.match(r"Error parsing ([\w.]+): (.*)", text)
    if check is None:
        return text
    group, message = check.groups()
    names = [part for option in options for part in (option, *option_groups(option))]
    if group not in names:
        return message
    first = re.match(r"[\w.]*", message)
    return f"{group}.{message}" if first and f"{group}.{first[0]}" in names else f"{group}: {message}"


def is_rule(row: str) -> bool:
    return re.fullmatch(r"[─-]{5,}|╰─*╯", row) is not None


def option_groups(name: str) -> Iterator[str]:
    """The groups that an option is in: a.b and a for a.b.c."""
    while name := name.rpartition(".")[0]:
        yield name


def describe_type(kind: Any) -> str:
    """A type in words, for messages."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} values ({', '.join(describe_type(argument) for argument in arguments)})"
    if origin in (tuple, list):
        return f"any number of values, each {describe_type(arguments[0])}"
    if origin is dict:
        return "pairs of a name and a value"
    return words.get(kind, str(kind))


def as_plain(value: Any) -> Any:
    """Dataclasses, tuples and infinities as what YAML can hold."""
    if dataclasses.is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
