"""Types of products, in the words of three compilers."""

from collections import Counter

import jax
import jax.numpy as jnp

from experiments.compiled_products import products_of

PROGRAM = """
%fused (parameter_0: s8[4,8], parameter_1: s8[8,2]) -> s32[4,2] {
  %parameter_0 = s8[4,8]{1,0} parameter(0)
  %parameter_1 = s8[8,2]{1,0} parameter(1)
  ROOT %dot.1 = s32[4,2]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}
}
ENTRY %main (parameter_0: bf16[4,8]) -> bf16[4,2] {
  %parameter_0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %weight = f32[8,2]{1,0} fusion(%parameter_0), kind=kLoop, calls=%fused
  %convolution.2 = bf16[4,2]{1,0} convolution(%parameter_0, %weight), dim_labels=bf_io->bf
  %library.3 = (f32[4,2]{1,0}, s8[9]{0}) custom-call(%weight, %weight), custom_call_target="__cublas$lt$matmul"
  %attention.4 = bf16[4,2]{1,0} custom-call(%parameter_0, %parameter_0), custom_call_target="__cudnn$fmhaSoftmax"
}
"""  # noqa: E501


def test_each_product_has_the_types_of_its_operands():
    assert products_of(PROGRAM) == Counter({"s8": 1, "bf16 x f32": 1, "f32": 1})


def test_a_program_of_this_machine():
    def run(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, length=3)[0] @ x

    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    text = jax.jit(run).lower(shape).compile().as_text()
    assert products_of(text) == Counter({"f32": 2})  # the loop's counts once
