"""`rayndom completion bash|zsh|fish`: commands, flags and names, completed by the shell."""

from __future__ import annotations

import argparse
import shlex

from orchestration import console
from orchestration.commands.command import Command

SHELLS = ("bash", "zsh", "fish")
NAMED = ("train", "show", "sweep", "evaluate", "analyse", "export", "compare", "open")
"""Commands whose first word may be the name of a recipe."""

_BASH = """\
_rayndom() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _rayndom rayndom
"""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="print the script of this shell")


def _run(arguments: argparse.Namespace) -> None:
    from orchestration.recipes import possible_names

    parsers = subparsers_of(arguments.root)
    flags = {
        name: sorted(flag for action in parser._actions for flag in action.option_strings if flag.startswith("--"))
        for name, parser in parsers.items()
    }
    words = {name: [*flags[name], *choices_of(parser), *(possible_names() if name in NAMED else ())] for name, parser in parsers.items()}
    if arguments.shell == "fish":
        lines = [f"complete -c rayndom -f -n __fish_use_subcommand -a {shlex.quote(' '.join(words))}"]
        lines += [
            f"complete -c rayndom -n '__fish_seen_subcommand_from {name}' -a {shlex.quote(' '.join(each))}" for name, each in words.items()
        ]
        console.text("\n".join(lines))
        return
    cases = "\n".join(f"            {name}) words={shlex.quote(' '.join(each))} ;;" for name, each in words.items())
    script = _BASH.format(commands=shlex.quote(" ".join(words)), cases=cases)
    console.text(("autoload -U +X bashcompinit && bashcompinit\n" if arguments.shell == "zsh" else "") + script)


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def choices_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the words that a command's arguments without a flag are chosen from."""
    return [str(choice) for action in parser._actions if not action.option_strings for choice in action.choices or ()]


COMPLETION = Command(
    "completion",
    "print what makes a shell complete commands, flags and names of recipes",
    (
        'eval "$(rayndom completion bash)"                        in ~/.bashrc',
        'eval "$(rayndom completion zsh)"                         in ~/.zshrc',
        "rayndom completion fish > ~/.config/fish/completions/rayndom.fish",
    ),
    _add,
    _run,
)
