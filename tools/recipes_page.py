"""Write docs/guide/recipes.md: every recipe, what differs from its source, and what `smalti plan` says of it.

    python tools/recipes_page.py

A test runs it again and compares, so that the page is never older than the recipes or the plan.
"""

import dataclasses
from pathlib import Path

from smalti.cost.plan import Plan
from smalti.cost.plan_time import pace
from smalti.workflows.plan import make_plan, plan_request
from smalti.workflows.recipes import Recipe, find_recipe, recipe_names

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "recipes.md"
DEVICE, DEVICES = "h100", 8

HEAD = f"""# Recipes

<!-- Written by `python tools/recipes_page.py`; change that file, or the recipes, and run it again. -->

```
smalti recipes
smalti train --config dit-xl-2-imagenet256 --data.path latents/imagenet256
smalti train --config dit-xl-2-imagenet256 --data.path latents/imagenet256 --dry-run
smalti recipes dit-xl-2-imagenet256 > mine.yaml
```

are the papers' full-scale trainings as settings that run: by name, or printed to be changed. Each value in a file
stands beside its source; what a source does not state is listed under `unknown`, with what stands in its place, and
where paper and released code are not the same, `differs` says which was chosen. A file of the same name in the working
folder is read instead of the recipe. `--dry-run` tries everything but the time, see [training](train.md);
`smalti launch` starts them on a cluster, see [launching](launch.md).

In all of them smalti differs from the released codes in four things:

- Early updates of the weight average use `(1 + n) / (10 + n)` instead of 0.9999, so that the initial weights leave no
  trace; after 90,000 steps the two are the same.
- Random numbers are functions of the seed and the sample, so no seed gives the numbers of another code.
- All images are trained on, as in the papers, so there is no validation loss. `--data.validation-fraction 0.01` brings
  one.
- Recipes of codes that multiply in TF32 say tf32; on a CPU that is fp32. `--precision bf16` is the fast choice, with
  weights, moments and average still in fp32; the last column is for it.

The released weights, and the numbers that these trainings reached, are listed by `smalti compare`; see
[comparing](compare.md).

Plans are for {DEVICES} H100 in one machine and assume a utilisation of 30 % in the table; `smalti plan` takes other
machines, and the utilisation of a measured run.

"""


TABLE = (
    "| recipe | parameters | steps x images | memory of one GPU | checkpoint | GPU hours | GPU hours in bf16 |",
    "|---|---|---|---|---|---|---|",
)


def planned(recipe: Recipe) -> Plan:
    """The plan of a recipe on the machine of the page."""
    return make_plan(plan_request(run=recipe.config, gpus_per_node=DEVICES, device=DEVICE))


def row(recipe: Recipe, plan: Plan) -> str:
    """Size, steps, memory and hours of the table."""
    config, memory = recipe.config, f"{plan.fit.peak / 2**30:.1f} GiB"
    fast = dataclasses.replace(plan.request, precision="bf16")
    share = plan.paces[1].utilisation
    hours = pace(fast, plan.device, share, plan.operations.step, plan.communication).device_hours
    return (
        f"| [{recipe.name}](#{recipe.name}) | {plan.parameters.total:,} | {config.steps:,} x {config.batch_size} "
        f"| {memory}{'' if plan.fit.verdict == 'yes' else ', see its plan'} | {plan.stored.bytes / 1e9:.2f} GB "
        f"| {plan.paces[1].device_hours:,.0f} in {config.precision} | {hours:,.0f} |"
    )


def section(recipe: Recipe, plan: Plan) -> list[str]:
    """A recipe in words, and its plan."""
    lines = [
        "",
        f"## {recipe.name}",
        "",
        f"{recipe.about.title}. {recipe.about.source}.",
        "",
        f"Data: {recipe.about.data}",
    ]
    lines += ["", *(f"- differs: {text}" for text in recipe.about.differs)]
    lines += [f"- not published: `{name}`: {text}" for name, text in recipe.unknown.items()]
    return [*lines, "", "```", *plan.lines(), "```"]


def page(names: list[str]) -> str:
    """The whole page, for these recipes."""
    plans = [(recipe, planned(recipe)) for recipe in map(find_recipe, names)]
    lines = [*TABLE, *(row(*pair) for pair in plans), *(line for pair in plans for line in section(*pair))]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(recipe_names()), encoding="utf-8")
