"""Loops that are written out before the compiler sees them.

NVVM unrolls short loops by itself and gives up on long ones, such as the quads of a tile: then every step pays for
indices that could be constants. ``for q in unroll(8):`` is an ordinary loop in Python, and eight copies of its body to
Numba, each with a number in place of q.
"""

import ast
import functools
import inspect
import textwrap


def unroll(count, when=True):
    """``range(count)``, which the compiler gets written out, unless ``when`` is false."""
    return range(count)


def written_out(function):
    """The function with its ``unroll`` loops written out; itself if it has none."""
    code = function.__code__
    if "unroll" not in (*code.co_names, *code.co_freevars):
        return function
    free = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    known = {**function.__globals__, **free}
    names = {}
    exec(_written(code, tuple((n, known[n]) for n in _names_of_loops(code) if n in known)), function.__globals__, names)
    made = names["outer"](**free)
    made.__module__ = function.__module__
    return made


@functools.cache
def _written(code, known):
    """Code that defines ``outer``, which makes the function of its free names; kernels have many parts in common."""
    made = _Writer(dict(known)).written(_definition(code), {})
    # a function around it, so that the free names stay free
    outer = ast.parse(f"def outer({', '.join(code.co_freevars)}):\n    return {code.co_name}").body[0]
    outer.body.insert(0, made)
    return compile(ast.Module([outer], []), code.co_filename, "exec")


@functools.cache
def _definition(code):
    """The syntax tree of a function, the same one for all that a factory makes of it: only to be read."""
    return ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]


@functools.cache
def _names_of_loops(code):
    """Names that say how often loops run, and whether they are written out."""
    loops = [x for x in ast.walk(_definition(code)) if isinstance(x, ast.Call) and _name(x.func) == "unroll"]
    return sorted({x.id for loop in loops for part in loop.args for x in ast.walk(part) if isinstance(x, ast.Name)})


_TREES = (ast.AST, list)


class _Writer:
    """Copies of trees. All loops around a statement are written out in one walk: kernels are large."""

    def __init__(self, known):
        self.known = known

    def written(self, part, numbers):
        """A copy of a tree, or of a list of them, with loops written out and numbers in place of their names."""
        if isinstance(part, list):
            return [made for item in part for made in self._item(item, numbers)]
        if isinstance(part, ast.Name) and part.id in numbers:
            return ast.copy_location(ast.Constant(numbers[part.id]), part)
        inner = vars(part).items()
        return type(part)(**{k: self.written(x, numbers) if isinstance(x, _TREES) else x for k, x in inner})

    def _item(self, item, numbers):
        """What stands in a list in the place of one item: of a loop that is written out, what its turns do."""
        if not (isinstance(item, ast.For) and isinstance(item.iter, ast.Call) and _name(item.iter.func) == "unroll"):
            return [self.written(item, numbers) if isinstance(item, ast.AST) else item]
        count, when = (self._value(argument, numbers) for argument in [*item.iter.args, ast.Constant(True)][:2])
        if when:
            turns = ({**numbers, item.target.id: turn} for turn in range(count))
            return [made for turn in turns for made in self.written(item.body, turn)]
        loop = self.written(item, numbers)
        loop.iter = ast.parse(f"range({count})", mode="eval").body
        return [loop]

    def _value(self, expression, numbers):
        code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<unroll>", "eval")
        return eval(code, self.known, numbers)


def _name(expression):
    return expression.id if isinstance(expression, ast.Name) else None
