"""A traceback with the values of all variables, for the log of a stage that has failed."""

import reprlib
import traceback
import types

from moult.run.redact import MASK, SECRET_NAME, redact


def traceback_with_variables(error: BaseException) -> str:
    """The traceback, then each frame with its variables: short values only, secrets masked."""
    shorten = _RedactingRepr()  # its arguments came with Python 3.12
    shorten.maxstring = shorten.maxother = 200
    shorten.maxlist, shorten.maxdict, shorten.maxlevel = 8, 12, 3
    lines = []
    for frame, line_number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {line_number}, in {code.co_name}')
        for name, value in frame.f_locals.items():
            if isinstance(value, types.ModuleType | types.FunctionType | type):
                continue
            try:
                shown = MASK if SECRET_NAME.search(name) else shorten.repr(value)
            except Exception as failure:
                shown = f"<repr failed: {type(failure).__name__}>"
            lines.append(f"      {name} = {shown}")
    chain = "".join(traceback.format_exception(error))
    return f"{chain}variables, outermost frame first:\n" + "\n".join(lines)


class _RedactingRepr(reprlib.Repr):
    """Masks before it shortens: half a token is no longer found."""

    def repr_str(self, text: str, level: int) -> str:
        return super().repr_str(redact(text), level)

    def repr_instance(self, value, level: int) -> str:
        try:
            text = redact(repr(value))
        except Exception:
            return super().repr_instance(value, level)
        return text if len(text) <= self.maxother else f"{text[: self.maxother]}..."

    def repr_dict(self, value: dict, level: int) -> str:
        masked = {
            key: MASK if isinstance(key, str) and SECRET_NAME.search(key) else item for key, item in value.items()
        }
        return super().repr_dict(masked, level)
