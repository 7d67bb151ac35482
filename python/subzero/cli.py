"""The command line: ``subzero train``."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .errors import CommandError
from .settings import Settings, defaults

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune language models with forward passes only, in random subspaces (SubZero).",
)


def main() -> None:
    """Run the command line; an error of the user's is one line, not a traceback."""
    try:
        app()
    except CommandError as error:
        fail(error)
    except (OSError, RuntimeError) as error:  # out of memory, a disk that fails: no fault of ours
        fail(CommandError(f"{error or type(error).__name__} (--debug shows where)", code=1), error)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        sys.exit(130)


def fail(error: CommandError, cause: Exception | None = None) -> None:
    """Print the error and leave with its code; with --debug show where it came from."""
    if "--debug" in sys.argv:
        raise cause or error
    Console(stderr=True, soft_wrap=True).print(
        f"[bold red]error[/] {escape(str(error))}", highlight=False
    )
    sys.exit(error.code)


def _version(show: bool) -> None:
    if show:
        from . import __version__

        typer.echo(f"subzero {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _option(group: str, flag: str, text: str, **how: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=group, **how)


def _recipe(group: str, flag: str, text: str) -> Any:
    """An option whose default comes from the method's recipe, which its help shows."""
    values = defaults(flag.partition("/")[0].removeprefix("--").replace("-", "_"))
    return _option(group, flag, f"{text} ({values})", show_default=False)


DATA, MODEL, TRAIN, OPTIM = "Task and data", "Model", "Training", "Optimizer"
D = Settings(model="", output="")


@app.command()
def train(
    model: Annotated[
        str, typer.Argument(help="Hugging Face id, local folder, or GGUF file.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the result.", show_default=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder if it is not empty.")
    ] = D.overwrite,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    task: Annotated[
        str | None,
        _option(
            DATA,
            "--task",
            "movie-reviews, sst2, rte, cb, boolq, wsc, wic, multirc, or text (language modelling).",
        ),
    ] = D.task,
    data: Annotated[
        str | None,
        _option(
            DATA, "--data", "CSV, TSV or JSONL file, or a datasets name (name or name/config)."
        ),
    ] = D.data,
    data_split: Annotated[
        str, _option(DATA, "--data-split", "Split to take from a datasets name.")
    ] = D.data_split,
    template: Annotated[
        str | None,
        _option(DATA, "--template", "Prompt; {x} is the text column, {name} any other column."),
    ] = D.template,
    label_words: Annotated[
        str | None,
        _option(DATA, "--label-words", 'Answer to the prompt of each label: "0=terrible,1=great".'),
    ] = D.label_words,
    text_column: Annotated[
        str | None, _option(DATA, "--text-column", "Column of the text (text, or the task's own).")
    ] = D.text_column,
    label_column: Annotated[
        str | None, _option(DATA, "--label-column", "Column of the label (label).")
    ] = D.label_column,
    train_examples: Annotated[
        int, _option(DATA, "--train-examples", "Train on at most this many.")
    ] = D.train_examples,
    dev_examples: Annotated[
        int, _option(DATA, "--dev-examples", "Held out to choose the best weights.")
    ] = D.dev_examples,
    test_examples: Annotated[
        int, _option(DATA, "--test-examples", "Held out to measure before and after.")
    ] = D.test_examples,
    split_seed: Annotated[
        int, _option(DATA, "--split-seed", "Decides which examples are held out.")
    ] = D.split_seed,
    max_tokens: Annotated[
        int, _option(DATA, "--max-tokens", "Longer prompts lose tokens at their beginning.")
    ] = D.max_tokens,
    train_layers: Annotated[
        str | None,
        _recipe(MODEL, "--train-layers", "all, upper (half), none, or numbers such as 15-29."),
    ] = D.train_layers,
    train_modules: Annotated[
        str | None,
        _recipe(
            MODEL,
            "--train-modules",
            "Matrices of these layers: all, residual (o_proj and down_proj, or what they are "
            "called), or names such as q_proj,v_proj.",
        ),
    ] = D.train_modules,
    train_embeddings: Annotated[
        bool | None,
        _recipe(
            MODEL, "--train-embeddings/--no-train-embeddings", "Also train embeddings and head."
        ),
    ] = D.train_embeddings,
    train_norms: Annotated[
        bool | None,
        _recipe(MODEL, "--train-norms/--no-train-norms", "Also train norm weights and biases."),
    ] = D.train_norms,
    dtype: Annotated[
        str, _option(MODEL, "--dtype", "Of the weights: float32, bfloat16, float16.")
    ] = D.dtype,
    device: Annotated[
        str, _option(MODEL, "--device", "auto takes a GPU where there is one.")
    ] = D.device,
    method: Annotated[
        str,
        _option(
            TRAIN,
            "--method",
            "activation, weight (both SubZero), mezo, adamw (with backpropagation), or auto: "
            "activation where the model allows it, else weight.",
        ),
    ] = D.method,
    paper: Annotated[
        bool,
        _option(
            TRAIN,
            "--paper",
            "The paper's own recipe: weight noise on all parameters, one two-sided query, plain "
            "SGD (--lr 1e-6 --rank 64 --steps 10000); options given with it win.",
        ),
    ] = D.paper,
    steps: Annotated[int | None, _recipe(TRAIN, "--steps", "Optimizer steps.")] = D.steps,
    batch_size: Annotated[int, _option(TRAIN, "--batch-size", "Examples a step.")] = D.batch_size,
    eval_every: Annotated[
        int | None,
        _option(
            TRAIN,
            "--eval-every",
            "Steps between evaluations on dev (a fifth of --steps).",
            show_default=False,
        ),
    ] = D.eval_every,
    schedule: Annotated[
        str | None,
        _recipe(TRAIN, "--schedule", "Of lr: cosine or linear to zero, or constant."),
    ] = D.schedule,
    seed: Annotated[int, _option(TRAIN, "--seed", "Of batches, bases and noise.")] = D.seed,
    max_minutes: Annotated[
        float | None,
        _option(TRAIN, "--max-minutes", "Stop training early after this long.", show_default=False),
    ] = D.max_minutes,
    lr: Annotated[
        float | None, _recipe(OPTIM, "--lr", "Learning rate, by --steps; at the default length")
    ] = D.lr,
    eps: Annotated[float | None, _recipe(OPTIM, "--eps", "Size of a perturbation.")] = D.eps,
    queries: Annotated[
        int | None,
        _recipe(
            OPTIM,
            "--queries",
            "Perturbations a step; 4 with noise on activations for task text.",
        ),
    ] = D.queries,
    rule: Annotated[
        str | None,
        _recipe(OPTIM, "--rule", "sgd, momentum, adam, norm, or muon."),
    ] = D.rule,
    rank: Annotated[
        int | None, _recipe(OPTIM, "--rank", "Of the subspace of each matrix.")
    ] = D.rank,
    refresh_every: Annotated[
        int | None, _recipe(OPTIM, "--refresh-every", "Steps until the subspaces are chosen anew.")
    ] = D.refresh_every,
    form: Annotated[
        str | None,
        _recipe(OPTIM, "--form", "right (W + B V'), core (W + U S V'), or full (W itself)."),
    ] = D.form,
    credit: Annotated[
        str | None,
        _recipe(
            OPTIM, "--credit", "block (one noise for a block's writers to the residual) or own."
        ),
    ] = D.credit,
    where: Annotated[
        str | None,
        _recipe(OPTIM, "--where", "Tokens with noise: loss (those whose logits it reads) or all."),
    ] = D.where,
    discount: Annotated[
        float | None,
        _recipe(OPTIM, "--discount", "Credit of a token for the losses of later ones, 0 to 1."),
    ] = D.discount,
    sides: Annotated[
        str | None,
        _recipe(OPTIM, "--sides", "one (a baseline and each query), two (each +/-), or auto."),
    ] = D.sides,
    apply: Annotated[
        str | None, _recipe(OPTIM, "--apply", "forward (weights stay read-only) or in_place.")
    ] = D.apply,
    momentum: Annotated[
        float | None, _recipe(OPTIM, "--momentum", "Of rules momentum and muon.")
    ] = D.momentum,
    beta1: Annotated[float | None, _recipe(OPTIM, "--beta1", "Of adam.")] = D.beta1,
    beta2: Annotated[float | None, _recipe(OPTIM, "--beta2", "Of adam.")] = D.beta2,
    adam_eps: Annotated[float | None, _recipe(OPTIM, "--adam-eps", "Of adam.")] = D.adam_eps,
    weight_decay: Annotated[
        float | None, _recipe(OPTIM, "--weight-decay", "Decoupled, on matrices.")
    ] = D.weight_decay,
    state_at_refresh: Annotated[
        str | None, _recipe(OPTIM, "--state-at-refresh", "reset or keep the rule's state.")
    ] = D.state_at_refresh,
    fold_rounding: Annotated[
        str | None, _recipe(OPTIM, "--fold-rounding", "nearest, stochastic, or auto (by dtype).")
    ] = D.fold_rounding,
    reshape: Annotated[
        str | None, _recipe(OPTIM, "--reshape", "none, square, grouped, or auto.")
    ] = D.reshape,
) -> None:
    """Fine-tune a causal language model and write the result to a folder.

    The data is divided into train, dev and test. Dev is evaluated while
    training and chooses the weights that are kept; test is measured on them
    once, and on the model as it was before. The folder gets the model
    (safetensors, for plain transformers), metrics.json, training.png,
    run.json (all options, versions) and command.txt.

    [bold]Examples[/bold]

    Movie reviews in a file with the columns text and label (0 or 1):

      subzero train HuggingFaceTB/SmolLM2-135M --task movie-reviews
      --data reviews.tsv -o runs/reviews

    Your own classes; each answer must be one token of the model:

      subzero train ./model --data mail.csv --text-column body
      --label-column folder --template "{x} This mail is about"
      --label-words "bills=money,trips=travel" -o runs/mail

    Plain language modelling:

      subzero train ./model --task text --data notes.jsonl -o runs/notes

    The paper's own recipe, and its loop that writes noise into the weights:

      subzero train ./model --task sst2 --paper -o runs/paper
      subzero train ./model --task sst2 --paper --apply in_place -o runs/loop

    Baselines on the same data, layers and batches:

      subzero train ./model --task sst2 --method mezo -o runs/mezo
      subzero train ./model --task sst2 --method adamw -o runs/adamw

    An option's help ends with its default in brackets, for each method
    that takes it; with another method it is an error.
    """
    given = dict(locals())
    given.pop("debug")
    settings = Settings(**given)
    # Heavy imports wait until the options have been understood.
    from .trainer import train as run

    run(settings, command=shlex.join(["subzero", *sys.argv[1:]]))


@app.command()
def replay(
    model: Annotated[
        str,
        typer.Argument(help="The model as it was before the run.", show_default=False),
    ],
    trajectory: Annotated[
        str, typer.Argument(help="File that opt.record wrote.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the result.", show_default=False)
    ],
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16, as in the run.")
    ] = "float32",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda; bit for bit on the run's own.")
    ] = "auto",
    drop_torn: Annotated[
        bool, typer.Option("--drop-torn", help="Leave out a last line that was cut off.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder if it is not empty.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Rebuild tuned weights from a trajectory, without data or forward passes.

    [bold]Example[/bold]

      subzero replay ./model trajectory.jsonl -o tuned
    """
    from .replay import replay as run

    run(model, trajectory, output, dtype, device, drop_torn, overwrite)
