"""Triton's interpreter without its search of `triton.language` at every call of a device function.

At the start of a kernel it puts its own functions in the place of the language's, and takes them away at the end. It
does so again for every device function, `tl.sum` among them, finds nothing left to replace, and spends half of its time
on that.
"""

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    if not hasattr(interpreter, "_LangPatchScope"):  # an older one
        return
    patch = interpreter._patch_lang

    def patch_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
