"""Loops that are written out before the compiler sees them.

NVVM unrolls short loops by itself and gives up on long ones, such as the quads of a tile: then every step pays for
indices that could be constants. ``for q in unroll(8):`` is an ordinary loop in Python, and eight copies of its body to
Numba, each with a number in place of q.
"""

import ast
import copy
import inspect
import textwrap


def unroll(count, when=True):
    """``range(count)``, which the compiler gets written out, unless ``when`` is false."""
    return range(count)


def written_out(function):
    """The function with its ``unroll`` loops written out; itself if it has none."""
    if "unroll" not in (*function.__code__.co_names, *function.__code__.co_freevars):
        return function
    free = inspect.getclosurevars(function).nonlocals
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    _Writer({**function.__globals__, **free}).visit(tree)
    # a function around it, so that the free names stay free
    outer = ast.parse(f"def outer({', '.join(free)}):\n    return {function.__name__}").body[0]
    outer.body.insert(0, tree.body[0])
    module = ast.fix_missing_locations(ast.Module([outer], []))
    names = {}
    exec(compile(module, inspect.getsourcefile(function), "exec"), function.__globals__, names)
    made = names["outer"](**free)
    made.__module__ = function.__module__
    return made


class _Writer(ast.NodeTransformer):
    def __init__(self, known):
        self.known = known

    def visit_For(self, node):
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "unroll"):
            return self.generic_visit(node)
        count, when = (self._value(argument) for argument in [*call.args, ast.Constant(True)][:2])
        if not when:
            node.iter = ast.copy_location(ast.Call(ast.Name("range", ast.Load()), [ast.Constant(count)], []), call)
            return self.generic_visit(node)
        statements = []
        for value in range(count):
            body = [_Constant(node.target.id, value).visit(copy.deepcopy(statement)) for statement in node.body]
            for statement in body:
                written = self.visit(statement)
                statements += written if isinstance(written, list) else [written]
        return statements

    def _value(self, expression):
        code = compile(ast.Expression(ast.fix_missing_locations(expression)), "<unroll>", "eval")
        return eval(code, dict(self.known))


class _Constant(ast.NodeTransformer):
    """Puts a number in place of a name."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def visit_Name(self, node):
        return ast.copy_location(ast.Constant(self.value), node) if node.id == self.name else node
