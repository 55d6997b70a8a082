"""The commands of the command line, one file each (or one per family). A command imports what is heavy only when it runs."""

from orchestration.commands.analyse import ANALYSE
from orchestration.commands.clean import CLEAN
from orchestration.commands.command import Command
from orchestration.commands.compare import COMPARE
from orchestration.commands.completion import COMPLETION
from orchestration.commands.data import DATA
from orchestration.commands.demo import DEMO
from orchestration.commands.doctor import DOCTOR
from orchestration.commands.evaluate import EVALUATE
from orchestration.commands.export import EXPORT
from orchestration.commands.jobs import LOGS, RESUME, STOP, SUBMIT
from orchestration.commands.looking_up import LIST, SHOW
from orchestration.commands.new import NEW
from orchestration.commands.open import OPEN
from orchestration.commands.reproduce import REPRODUCE
from orchestration.commands.rescore import RESCORE
from orchestration.commands.simulate import SIMULATE
from orchestration.commands.status import STATUS, WATCH
from orchestration.commands.sweep import SWEEP
from orchestration.commands.train import TRAIN
from orchestration.commands.ui import UI

COMMANDS: tuple[Command, ...] = (
    DEMO,
    TRAIN,
    SWEEP,
    SIMULATE,
    STATUS,
    WATCH,
    SUBMIT,
    LOGS,
    STOP,
    RESUME,
    EVALUATE,
    RESCORE,
    EXPORT,
    LIST,
    SHOW,
    NEW,
    DATA,
    OPEN,
    UI,
    DOCTOR,
    ANALYSE,
    COMPARE,
    REPRODUCE,
    COMPLETION,
    CLEAN,
)
