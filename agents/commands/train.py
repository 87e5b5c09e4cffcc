"""``textrl train``: any agent on any environment, into a run directory that can be resumed.

The flags are those below and one for each hyper-parameter of the chosen agent, read from its signature and
docstring, so a class of one's own (``--agent my_module:MyAgent``) has its flags too. That is why this command
parses its own arguments: which flags there are depends on ``--agent``.
"""

# No "from __future__ import annotations" here: the signature of `_train` is read and extended as it is.
import contextlib
import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.algorithms import methods
from agents.commands import flags as hyper
from agents.commands import interruptible, offline

SETTINGS = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    "add_help_option": False,
}
#: What may be given beside --resume; everything else is in the run's config.json.
_WITH_RESUME = (
    "resume",
    "allow_module",
    "total_timesteps",
    "save_every",
    "keep",
    "progress",
    "device",
    "report_to",
)
_RUN, _ENV, _TEXT, _SAVING = "Run", "Environment and policy", "TextRLHF-v0", "Saving and resuming"
_EVALUATION = "Evaluation on the way"
_LOADING, _WEIGHTS = "Loading of --model", "What is trained of --model, and how"
#: Flags that the trainers on files have too: what the policy takes, what the environment takes, and the rest.
_POLICY_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing", "save_dtype")
_SHARED = dict.fromkeys((*_POLICY_OPTIONS, "autocast"), _WEIGHTS) | {"report_to": _SAVING}
_GAME = "TextGame-v0 (and what it shares with TextRLHF-v0)"


def train(ctx: typer.Context) -> None:
    """Train an agent; --help lists every hyper-parameter of the --agent that is named."""
    from agents.commands.terminal import quiet_transformers
    from agents.runs.registry import find_agent

    quiet_transformers()
    spec = _peek(ctx.args, "--agent")
    cls = find_agent(spec) if spec else _agent_of_resumed(ctx.args) or find_agent("ppo")
    spec = spec or ("ppo" if "--help" in ctx.args else cls.__name__)
    flags = hyper.hyper_parameters(cls)
    command = _with_flags(flags, ctx.args)
    hyper.check_options(ctx.args, _option_names(command), lambda option: _of_other_agents(cls, option))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command(help=_help(spec))(command)
    code = app(ctx.args, prog_name="textrl train", standalone_mode=False)
    if code:
        raise typer.Exit(code)


def _of_other_agents(cls: type, option: str) -> str | None:
    """Why an agent has no flag that others have; None for a flag that no agent of the package has."""
    from agents.arguments import refusal
    from agents.runs.registry import find_agent

    why = refusal(cls, option.removeprefix("--").replace("-", "_"))
    if why is not None:
        return f"{cls.__name__} takes no {option}: {why}"
    for name in methods.names():
        found = [flag for flag in hyper.hyper_parameters(find_agent(name)) if option == flag.option]
        if found:
            return f"{cls.__name__} takes no {option}, which is of {found[0].owner}"
    return None


def _train(
    env: Annotated[str, typer.Option(help="Gymnasium id.", rich_help_panel=_RUN)] = "TextRLHF-v0",
    agent: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(methods.names())}, my_module:MyAgent or file.py:MyAgent.",
            rich_help_panel=_RUN,
        ),
    ] = "ppo",
    total_timesteps: Annotated[
        int, typer.Option(min=1, help="Env steps to learn for; on text, tokens.", rich_help_panel=_RUN)
    ] = 100_000,
    seed: Annotated[
        int, typer.Option(min=0, help="Of weights, sampling, data order and env.", rich_help_panel=_RUN)
    ] = 0,
    run_dir: Annotated[
        str | None,
        typer.Option(
            help="Where everything goes.", show_default="runs/<agent>-<env>-<seed>", rich_help_panel=_RUN
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.", rich_help_panel=_RUN)] = "auto",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.", rich_help_panel=_RUN)] = True,
    guards: Annotated[
        bool,
        typer.Option(help="Say on the way what goes wrong with a language model.", rich_help_panel=_RUN),
    ] = True,
    eval_every: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|none",
            help="Timesteps between two evaluations on held-out prompts; the best policy is kept in best/.",
            show_default="an eighth of the run, 10000 or more, in the embedded world; else none",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to evaluate on, none of which should be in --prompts.",
            show_default="held out in the embedded world, else --prompts",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    eval_episodes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Sampled answers of an evaluation, as many to each prompt.",
            rich_help_panel=_EVALUATION,
        ),
    ] = 256,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Stop where answers are further from the reference; without --gold, best/ is the highest score within "
            "it.",
            show_default="none",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(help="auto, MlpPolicy, CausalLMPolicy or my_module:MyPolicy.", rich_help_panel=_ENV),
    ] = "auto",
    policy_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument of the policy; repeatable.", rich_help_panel=_ENV),
    ] = None,
    env_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Argument of the env, the value as JSON; repeatable.",
            rich_help_panel=_ENV,
        ),
    ] = None,
    n_envs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Slots of the vector env.", show_default="the agent's", rich_help_panel=_ENV
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a causal LM: reference and initial policy.",
            show_default="the embedded one",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|URL",
            help="What writes the responses: native, transformers, vllm, the address of a vLLM server, or "
            "my_module:MyGenerator.",
            show_default="native",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Folder or hub id of a classifier, package.module:function or file.py:function; repeatable.",
            show_default="the embedded one",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    reward_weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each --reward, in their order.", show_default="1", rich_help_panel=_TEXT),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="A second reward, logged and never trained on.", rich_help_panel=_TEXT
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help=".jsonl, .txt, .csv or .parquet.",
            show_default="embedded",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    chat_template_kwargs: offline.ChatTemplateKwargs = None,
    allow_control_tokens: offline.AllowControlTokens = False,
    kl_coef: Annotated[
        float | None,
        typer.Option(help="Weight of the KL in the reward.", show_default="0.05", rich_help_panel=_TEXT),
    ] = None,
    kl_estimator: Annotated[
        str | None, typer.Option(help="k1, k2 or k3.", show_default="k1", rich_help_panel=_TEXT)
    ] = None,
    adaptive_kl_target: Annotated[
        float | None,
        typer.Option(
            help="Adapt --kl-coef so that the KL of a response comes to this many nats.",
            show_default="fixed --kl-coef",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    adaptive_kl_horizon: Annotated[
        float | None,
        typer.Option(
            help="Episodes over which the coefficient may change by a fifth.",
            show_default="10000",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    anneal_kl_start: Annotated[
        float | None,
        typer.Option(
            help="Let the KL coefficient fall from here to --kl-coef.",
            show_default="fixed --kl-coef",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    anneal_kl_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the timesteps in which it falls.", show_default="0.7", rich_help_panel=_TEXT
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Budget of a response in tokens.",
            show_default="256; 24 with the embedded model",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that a prompt may have; --too-long says what becomes of longer ones.",
            show_default="the longest prompt",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    too_long: Annotated[
        str | None,
        typer.Option(
            help="error, skip (leave them out) or cut (keep their last tokens); what is skipped or cut is counted.",
            show_default="error",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Divides the logits everywhere.", show_default="1.0", rich_help_panel=_TEXT),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens that together have this probability.",
            show_default="1, all of them",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample from so many of the likeliest tokens.",
            show_default="0, all of them",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from tokens at least so likely as a share of the likeliest one's probability.",
            show_default="0, all of them",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Sample no end token before so many others.", show_default="0", rich_help_panel=_TEXT
        ),
    ] = None,
    missing_eos_penalty: Annotated[
        float | None,
        typer.Option(
            help="Taken off a response cut by the budget.", show_default="0.0", rich_help_panel=_TEXT
        ),
    ] = None,
    game: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="package.module:Game, file.py:Game, or a name that docs/games.md lists, such as FrozenLake-v1; "
            "--env is TextGame-v0 then.",
            show_default="the embedded one",
            rich_help_panel=_GAME,
        ),
    ] = None,
    game_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Arguments of the game.", show_default="{}", rich_help_panel=_GAME),
    ] = None,
    max_turns: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of an episode.", show_default="4", rich_help_panel=_GAME),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a whole conversation.",
            show_default="the model's context, at most 2048",
            rich_help_panel=_GAME,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows that a game begins from: .jsonl, .csv or .parquet.",
            show_default="none",
            rich_help_panel=_GAME,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A text that ends a turn; repeatable.",
            show_default="none",
            rich_help_panel=_GAME,
        ),
    ] = None,
    save_every: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|TIME",
            help="Timesteps (5000), a time (90s, 15m, 2h) or both (5000,15m) between checkpoints.",
            show_default="a tenth of all, and 15m",
            rich_help_panel=_SAVING,
        ),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.", rich_help_panel=_SAVING)] = 2,
    log_interval: Annotated[
        int, typer.Option(min=1, help="Updates between two rows of the log.", rich_help_panel=_SAVING)
    ] = 1,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Go on with this run, its settings as they were; --total-timesteps may be raised.",
            rich_help_panel=_SAVING,
        ),
    ] = None,
    allow_module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="With --resume: a module or .py file of your own whose code the run may name; repeatable.",
            show_default="none",
            rich_help_panel=_SAVING,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete the run that --run-dir holds.", rich_help_panel=_SAVING),
    ] = False,
):
    """The signature of the general flags; :func:`_run` receives their values."""


def _with_flags(flags: list[hyper.Flag], args: list[str]) -> Any:
    """The command for typer: the general flags, those that trainers on files have too, and those of one agent."""
    loading = hyper.loading_flags()
    panels = _SHARED | {flag.name: _LOADING for flag in loading}
    shared = [flag for flag in hyper.trainer_flags() if flag.name in panels]

    def command(ctx: typer.Context, **values: Any) -> None:
        # Typer's contexts know where a value came from; its enum is not public, its names are click's.
        given = {n for n in values if ctx.get_parameter_source(n).name == "COMMANDLINE"}
        own = {flag.name: flag for flag in flags}
        chosen = {n: _hyper_value(own[n], values[n]) for n in own if n in given}
        general = {n: value for n, value in values.items() if n not in own}
        general |= hyper.parse_values(shared, {n: general[n] for n in given if n in panels})
        if general["game"] is not None and "env" not in given:
            general["env"] = "TextGame-v0"
        interruptible(_run)(general, given, chosen, flags, shlex.join(["textrl", "train", *args]))

    general = list(inspect.signature(_train).parameters.values())
    general += hyper.as_typer_parameters(shared, panels, {"report_to": hyper.REPORT_TO})
    taken = {parameter.name for parameter in general}
    flags = [flag for flag in flags if flag.name not in taken]
    options = hyper.as_typer_parameters(flags)
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    general = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in general]
    command.__signature__ = inspect.Signature([context, *general, *options])
    command.__annotations__ = {}
    return command


def _hyper_value(flag: hyper.Flag, value: Any) -> Any:
    return value if isinstance(value, bool) else hyper.parse_value(flag, value)


def _option_names(command: Any) -> list[str]:
    """Every ``--option`` of a command made by :func:`_with_flags`."""
    names = ["--help"]
    for parameter in list(command.__signature__.parameters.values())[1:]:
        option = "--" + parameter.name.replace("_", "-")
        names += [option, option.replace("--", "--no-", 1)] if _is_bool(parameter) else [option]
    return names


def _is_bool(parameter: inspect.Parameter) -> bool:
    return parameter.annotation.__origin__ in (bool, bool | None)


def _help(spec: str) -> str:
    return (
        "Train an agent, into a run directory with TensorBoard events, checkpoints and config.json.\n\n"
        f"The hyper-parameters at the end are those of --agent {spec}; name another to see its own."
    )


def _peek(args: list[str], option: str) -> str | None:
    """The value of an option before the arguments are parsed."""
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def _peek_all(args: list[str], option: str) -> list[str]:
    """All values of a repeatable option before the arguments are parsed."""
    found = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == option]
    return found + [arg.partition("=")[2] for arg in args if arg.startswith(f"{option}=")]


def _agent_of_resumed(args: list[str]) -> type | None:
    """The agent class of the run that --resume names."""
    folder = _peek(args, "--resume")
    if folder is None or "--help" in args:
        return None
    from agents.runs import run_directory as runs
    from agents.runs.registry import find_agent

    allowed = [_absolute(module) for module in _peek_all(args, "--allow-module")]
    config = runs.read_config(Path(folder))
    with runs.names_of_run(Path(folder), allowed):
        try:
            return find_agent(config["agent"])
        except ModuleNotFoundError as error:
            raise _with_place(error, config) from error


def _with_place(error: ModuleNotFoundError, config: dict[str, Any]) -> ModuleNotFoundError:
    """The same error, saying where the module was when the run began; a file's word for it is not followed."""
    place = config["working_directory"]
    file = Path(place) / f"{error.name or 'module'}.py"
    return ModuleNotFoundError(
        f"{error} The run was started in {place}: resume it from there, or allow the file itself, "
        f"--allow-module {file}",
        name=error.name,
    )


# -- running ------------------------------------------------------------------------------------------------


def _run(
    values: dict[str, Any], given: set[str], chosen: dict[str, Any], flags: list[hyper.Flag], line: str
) -> None:
    from agents.parallel.processes import current
    from agents.runs import run_directory as runs
    from agents.runs.lock import locked
    from agents.runs.saving import parse_save_every

    processes = current()
    hold = locked if processes.is_main else contextlib.nullcontext
    if values["save_every"] is not None:
        parse_save_every(values["save_every"])
    _eval_every(values)  # before anything is read or made
    if values["resume"] is not None:
        folder = Path(values["resume"])
        runs.read_config(folder)  # before a lock is made in a folder that is no run
        with hold(folder):
            config, agent = _resume(folder, values, given)
            if agent is None:
                print(
                    f"{folder} is complete at {config['total_timesteps']:,} timesteps; "
                    "go on with a larger --total-timesteps"
                )
                return
            processes.on_main(lambda: runs.write_config(folder, config))
            _learn(agent, folder, config, values["progress"])
        return
    if values["allow_module"]:
        raise ValueError(
            "--allow-module goes with --resume; a new run may use whatever module its own flags name"
        )
    config = _config(values, chosen, flags, line)
    folder = Path(values["run_dir"] or _default_folder(config))
    processes.on_main(lambda: runs.check_directory(folder, values["overwrite"]))
    agent = runs.make_agent(config)  # before anything is deleted or written
    agent.check_shares()
    config["in_force"] = _show_settings(agent, config)
    with hold(folder):
        if processes.is_main:
            runs.prepare_directory(folder, values["overwrite"])
            runs.write_config(folder, config)
        _learn(agent, folder, config, values["progress"])


def _show_settings(agent: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Print what is in force and return it for the configuration."""
    from rich.console import Console

    from agents.commands import terminal
    from agents.runs.settings import in_force

    names = ("total_timesteps", "seed", "save_every")
    run = {name: config[name] for name in names} | {"device": str(agent.device)}
    console = Console()
    console.print(terminal.settings_table(agent, run))
    if (hint := terminal.unused_template(agent)) is not None:
        console.print(hint, style="yellow", highlight=False)
    return in_force(agent)


def _resume(folder: Path, values: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], Any]:
    """The configuration of a run, and its agent where it stopped (None if there is nothing left to do)."""
    from agents.parallel.processes import current
    from agents.runs import run_directory as runs
    from textrl_env.printable import printable

    for name in sorted(given - set(_WITH_RESUME)):
        option = "--" + name.replace("_", "-")
        raise ValueError(
            f"{option} cannot be changed on the way: --resume takes it from {values['resume']}/config.json. "
            f"Beside --resume go {', '.join('--' + n.replace('_', '-') for n in _WITH_RESUME[1:])}"
        )
    config = runs.read_config(folder)
    config |= {name: values[name] for name in given if name in config}
    try:
        timesteps, checkpoint, torn = current().on_main(lambda: runs.newest_whole(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; start it anew with: {config['command']} --overwrite") from None
    for each in torn:
        print(f"{printable(each)}; the one before it is taken")
    if timesteps >= config["total_timesteps"] and checkpoint.name == runs.FINAL:
        return config, None
    print(f"resuming {folder} at {timesteps:,} timesteps, from {checkpoint.name}")
    allowed = [_absolute(module) for module in values["allow_module"] or ()]
    try:
        return config, runs.load_agent(config, checkpoint, allowed, folder)
    except ModuleNotFoundError as error:
        raise _with_place(error, config) from error


def _learn(agent: Any, folder: Path, config: dict[str, Any], progress: bool) -> None:
    from agents.commands.learning import learn
    from agents.runs.saving import what_a_kill_loses

    print(f"{folder}: {what_a_kill_loses(config['save_every'], 'timesteps')}")
    learn(agent, folder, config, progress=progress)
    if agent.processes.is_main:
        _summarise(agent, folder, config)


def _summarise(agent: Any, folder: Path, config: dict[str, Any]) -> None:
    from rich.console import Console

    from agents.commands import terminal
    from agents.runs import run_directory as runs
    from agents.runs.best import best_timesteps

    console = Console()
    console.print()
    console.print(terminal.metrics_table(agent.latest))
    commands = [
        (f"textrl report {folder}", "the run as one page that can be sent"),
        (f"tensorboard --logdir {folder}", "http://localhost:6006/#custom_scalars: the curves that matter"),
    ]
    if agent.text_env is not None:
        from agents.evaluation.evaluation import evaluate_policy

        env = agent.text_env
        rows = range(0, env.num_prompts, -(-env.num_prompts // 5))
        before, after = (evaluate_policy(who, env, n_samples=1, prompt_ids=rows) for who in (env.lm, agent))
        console.print(terminal.samples_table(before, after, range(len(rows)), "Answers before and after"))
        final = "a Hugging Face folder: AutoModelForCausalLM.from_pretrained loads it"
    else:
        final = f"load it with {type(agent).__name__}.load"
    what = [("final", final), ("progress.csv", "the log"), ("config.json", "all settings")]
    if (folder / runs.BEST).is_dir():
        what.insert(
            0,
            ("best", f"the same of the best evaluation, at {best_timesteps(folder / runs.BEST):,} timesteps"),
        )
    longer = 2 * agent.num_timesteps
    again = f"{runs.resume_command(folder, config)} --total-timesteps {longer}"
    commands.append((again, "go on for as long again"))
    terminal.print_files(console, folder, what, commands)


# -- configuration ------------------------------------------------------------------------------------------


def _config(
    values: dict[str, Any], chosen: dict[str, Any], flags: list[hyper.Flag], line: str
) -> dict[str, Any]:
    from agents.runs import run_directory as runs

    env_kwargs = _env_kwargs(values)
    report_to = values["report_to"] or hyper.REPORT_TO
    names = (
        "total_timesteps",
        "seed",
        "policy",
        "n_envs",
        "device",
        "save_every",
        "keep",
        "log_interval",
        "env",
        "guards",
        "eval_episodes",
        "kl_budget",
    )
    return runs.new_config(
        **{name: values[name] for name in names},
        agent=_absolute(values["agent"]),
        report_to=report_to,
        agent_kwargs=chosen,
        policy_kwargs=_policy_kwargs(values),
        env_kwargs=env_kwargs,
        adaptive_kl=_adaptive_kl(values),
        anneal_kl=_anneal_kl(values, env_kwargs.get("kl_coef")),
        eval_every=_eval_every(values),
        eval_prompts=None if values["eval_prompts"] is None else _absolute(values["eval_prompts"]),
        command=line,
        defaults={f.name: f.default for f in flags if f.name not in chosen and _is_plain(f.default)},
    )


def _adaptive_kl(values: dict[str, Any]) -> dict[str, float] | None:
    """Arguments of the KL controller; None for a fixed coefficient."""
    target, horizon = values["adaptive_kl_target"], values["adaptive_kl_horizon"]
    if target is None and horizon is not None:
        raise ValueError("--adaptive-kl-horizon goes with --adaptive-kl-target, the KL to aim for")
    given = {"target": target, "horizon": horizon}
    return None if target is None else _without_none(given)


def _anneal_kl(values: dict[str, Any], target: float | None) -> dict[str, float] | None:
    """Arguments of the falling KL coefficient; None for a fixed one."""
    start, share = values["anneal_kl_start"], values["anneal_kl_share"]
    if start is None and share is not None:
        raise ValueError("--anneal-kl-share goes with --anneal-kl-start, the coefficient to begin with")
    if start is None:
        return None
    if target is None:
        raise ValueError("--anneal-kl-start goes with --kl-coef, the coefficient to end with")
    if values["adaptive_kl_target"] is not None:
        raise ValueError(
            "--anneal-kl-start and --adaptive-kl-target both change the KL coefficient; choose one"
        )
    return _without_none({"start": start, "target": target, "share": share})


#: Runs of fewer timesteps are not evaluated unless asked to: that would take longer than they do.
_EVALUATED_FROM = 20_000
_EVALUATIONS, _EVERY_AT_LEAST = 8, 10_000


def _eval_every(values: dict[str, Any]) -> int | None:
    """Timesteps between two evaluations; None for none.

    Raises:
        ValueError: --eval-every is neither a number of timesteps nor none, or --eval-prompts has nothing to do.
    """
    given, total, prompts = (values[name] for name in ("eval_every", "total_timesteps", "eval_prompts"))
    every = None
    if given is not None and given.lower() != "none":
        number = given.replace("_", "")
        if not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"--eval-every takes timesteps (10000) or none, got {given!r}")
        every = int(number)
    elif given is None and prompts is not None:
        every = max(total // _EVALUATIONS, 1)
    elif given is None and _is_embedded(values) and total >= _EVALUATED_FROM:
        every = max(total // _EVALUATIONS, _EVERY_AT_LEAST)
    if every is None and prompts is not None:
        raise ValueError("--eval-prompts goes with --eval-every, the timesteps between two evaluations")
    return every


def _is_embedded(values: dict[str, Any]) -> bool:
    """Whether the embedded world's own prompts are trained on, so that its held-out ones and its gold judge fit."""
    given = {assignment.partition("=")[0] for assignment in values["env_arg"] or ()}
    is_text = values["env"].rpartition(":")[2].startswith("TextRLHF")
    return is_text and values["prompts"] is None and "prompts" not in given


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _is_plain(default: Any) -> bool:
    return default is None or isinstance(default, (bool, int, float, str))


def _policy_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    given = _without_none({name: values[name] for name in (*_POLICY_OPTIONS, "generator")})
    sampling = _without_none({name: values[name] for name in ("top_p", "top_k", "min_p", "min_new_tokens")})
    given |= {"sampling": sampling} if sampling else {}
    extra = hyper.parse_assignments("--policy-arg", values["policy_arg"] or ())
    for name in extra.keys() & given.keys():
        raise ValueError(f"{name} was given twice, as a flag and with --policy-arg")
    return given | extra


def _env_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    names = (
        "kl_coef",
        "kl_estimator",
        "max_new_tokens",
        "max_prompt_length",
        "too_long",
        "temperature",
        "missing_eos_penalty",
        "autocast",
        "max_turns",
        "max_length",
        "stop",
        *(flag.name for flag in hyper.loading_flags()),
    )
    given = {name: values[name] for name in names if values[name] is not None}
    paths = ("model", "prompts", "gold", "game", "rows")
    given |= {name: _absolute(values[name]) for name in paths if values[name] is not None}
    for name in ("chat_template_kwargs", "game_kwargs"):
        parsed = hyper.parse_object(f"--{name.replace('_', '-')}", values[name])
        if parsed is not None:
            given[name] = parsed
    if values["allow_control_tokens"]:
        given["allow_control_tokens"] = True
    rewards, weights = [_absolute(spec) for spec in values["reward"] or ()], values["reward_weight"] or []
    if weights and len(weights) != len(rewards):
        raise ValueError(
            f"{len(weights)} --reward-weight for {len(rewards)} --reward; give one for each, in order"
        )
    if rewards:
        given["reward"] = rewards[0] if len(rewards) == 1 and not weights else rewards
    if weights:
        given["reward"] = [list(pair) for pair in zip(rewards, weights, strict=True)]
    extra = hyper.parse_assignments("--env-arg", values["env_arg"] or ())
    for name in extra.keys() & given.keys():
        raise ValueError(f"{name} was given twice, as a flag and with --env-arg")
    return given | extra


def _absolute(spec: str) -> str:
    """A path that is there, made absolute, so that the run can be resumed from anywhere; all else as it is."""
    where, colon, rest = spec.partition(".py:")
    if colon and Path(f"{where}.py").is_file():
        return f"{Path(f'{where}.py').resolve()}:{rest}"
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def _default_folder(config: dict[str, Any]) -> str:
    agent = config["agent"].rpartition(":")[2].lower()
    env = config["env"].rpartition(":")[2].replace("/", "-")
    return f"runs/{agent}-{env}-{config['seed']}"
