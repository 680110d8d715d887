"""What people say about a task to be evaluated."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TaskOptions(BaseModel):
    """One task of lm-eval: its own, or one described by a local YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, strict=True)] = Field(description="name of the task")
    include: Annotated[str, Field(min_length=1, strict=True)] | None = Field(
        None, description="folder of YAML files with tasks of your own; else the tasks that lm-eval brings"
    )
    metric: str | None = Field(None, description="which of the task's metrics counts; else its first")
    filter: str | None = Field(None, description="which of the task's filters counts; else its first")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="weight of this task where scores of several are averaged"
    )
    chat_template: bool = Field(False, strict=True, description="wrap prompts in the tokenizer's chat template")
