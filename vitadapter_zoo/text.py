"""Text of others, made safe to print: class names, file names and URLs may hold anything."""

LONGEST = 120  # characters


def printable(text: object, longest: int = LONGEST) -> str:
    r"""The text as one line of at most ``longest`` characters, without control characters.

    Control characters, which can clear a terminal or forge further lines, are written as Python
    escapes (``\x1b``), and so are characters that no font or encoding has (lone surrogates).
    """
    whole = str(text)
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in whole[: longest + 1]
    )
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
