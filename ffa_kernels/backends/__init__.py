"""Implementations of the ops, one module a backend; `dispatch` chooses among them."""
