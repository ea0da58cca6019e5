"""A part is a component named in a recipe: which class, with which checked params.

A field typed `Part[Sampler]` accepts `{name: top-k-top-p, top_k: 900}`. The class registered as the
sampler "top-k-top-p" checks the rest of the mapping against its own `Params`, so a slot can stand
anywhere, a plugin's own params included.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sandbox.errors import did_you_mean

T = TypeVar("T")


def _word(value: Any) -> Any:
    """YAML reads a plain on or off as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]
"""A setting that by itself is on where that is worth while."""


class Incidental:
    """Marks a setting that no result depends on, as in `Annotated[int, sandbox.INCIDENTAL]`: it may
    change when a run goes on, and makes no other cache."""


INCIDENTAL: Final = Incidental()
DECIDING: Final = {"deciding": True}
"""The context in which settings are told without what is incidental."""


def _deciding(info: SerializationInfo) -> bool:
    return info.context is DECIDING


class Params(BaseModel):
    """What a recipe may set on a component. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__, [cls._suggest(details) for details in error.errors()]
            ) from None

    @model_serializer(mode="wrap")
    def _tell(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        told: dict[str, Any] = handler(self)
        if not _deciding(info):
            return told
        fields = type(self).model_fields.items()
        incidental = {name for name, field in fields if INCIDENTAL in field.metadata}
        return {name: value for name, value in told.items() if name not in incidental}

    @classmethod
    def _suggest(cls, details: Any) -> InitErrorDetails:
        message = details["msg"].removeprefix("Value error, ")
        if details["type"] == "extra_forbidden" and len(details["loc"]) == 1:
            key, known = str(details["loc"][0]), cls.model_fields
            message = "unknown key" + (did_you_mean(key, known) or f" (known: {', '.join(known)})")
        kind = PydanticCustomError(details["type"], "{message}", {"message": message})
        return InitErrorDetails(type=kind, loc=details["loc"], input=details["input"])


class Part(Generic[T]):
    """A component that is chosen and configured but not yet built."""

    def __init__(self, name: str, cls: type[T], params: Params) -> None:
        self.name, self.cls, self.params = name, cls, params

    def build(self, *handed: Any) -> T:
        """Build it, with what the caller hands over and a recipe cannot know."""
        made: Callable[..., T] = self.cls  # what is handed over differs by interface
        return made(self.params, *handed)

    def to_dict(self, *, deciding: bool = False) -> dict[str, Any]:
        """The part as a recipe states it, defaults included; or only what results depend on."""
        told = self.params.model_dump(mode="json", context=DECIDING if deciding else None)
        return {"name": self.name, **told}

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        (interface,) = get_args(source)

        def check(value: Any, info: core_schema.ValidationInfo) -> "Part[T]":
            if isinstance(value, str):  # a bare name is a part with its defaults
                value = {"name": value}
            if isinstance(value, Part):
                return value
            if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                raise PydanticCustomError("part", "expected a name or a mapping with a 'name'")
            if not info.context or "registry" not in info.context:
                raise PydanticCustomError(
                    "part", "a part by name needs a registry: see load_recipe"
                )
            component = info.context["registry"].find(interface, value["name"])
            settings = {key: v for key, v in value.items() if key != "name"}
            params = component.Params.model_validate(settings, context=info.context)
            return Part(value["name"], component, params)

        def tell(part: "Part[T]", info: SerializationInfo) -> dict[str, Any]:
            return part.to_dict(deciding=_deciding(info))

        telling = core_schema.plain_serializer_function_ser_schema(tell, info_arg=True)
        return core_schema.with_info_plain_validator_function(check, serialization=telling)
