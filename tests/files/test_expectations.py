"""What a refused value should be, in words without pydantic's."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nybble.files.expectations import expectation


class Part(BaseModel):
    """Something with a name."""

    model_config = ConfigDict(strict=True)
    name: str


def refused(value: str) -> str:
    raise ValueError("JSON schemas are not taken")


@pytest.mark.parametrize(
    "kind, value, said",
    [
        (int, "x", "should be a whole number"),
        (int, 1.5, "should be a whole number"),
        (int, [], "should be a whole number"),
        (int, "9" * 5000, "should be a whole number"),
        (float, "x", "should be a number"),
        (float, None, "should be a number"),
        (bool, "perhaps", "should be true or false"),
        (str, 1, "should be text"),
        (list[int], 7, "should be a list"),
        (dict[str, int], 7, "should be a mapping"),
        (Part, 7, "should be a mapping"),
        (Annotated[float, Field(gt=0)], -1, "should be above 0"),
        (Annotated[float, Field(le=0.5)], 1, "should be at most 0.5"),
        (Annotated[int, Field(ge=1)], 0, "should be at least 1"),
        (Annotated[int, Field(lt=2**32)], 2**32, "should be below 4294967296"),
        (Annotated[float, Field(allow_inf_nan=False)], float("inf"), "should be a finite number"),
        (Literal["a", "b"], "c", "should be 'a' or 'b'"),
        (Annotated[str, AfterValidator(refused)], "x", "JSON schemas are not taken"),
        (Annotated[str, Field(max_length=2)], "abc", "string should have at most 2 characters"),
    ],
)
def test_it_is_said_without_pydantic_s_words(kind, value, said):
    with pytest.raises(ValidationError) as fault:
        TypeAdapter(kind).validate_python(value)
    assert expectation(fault.value.errors()[0]) == said
