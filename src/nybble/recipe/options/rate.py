"""A learning rate: a number above 0, or auto."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from nybble.files.expectations import expectation

AUTO: Literal["auto"] = "auto"
NUMBER = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])


def _checked(value: Any) -> Any:
    """The rate; a fault is that of the number, since a union would report one for each of its members."""
    if value == AUTO:
        return AUTO
    try:
        return NUMBER.validate_python(value)
    except ValidationError as error:
        raise PydanticCustomError("learning_rate", "{reason}", {"reason": expectation(error.errors()[0])}) from error


LearningRate = Annotated[float | Literal["auto"], PlainValidator(_checked)]
