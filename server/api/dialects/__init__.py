"""How models write what is more than text: thoughts and calls of tools, in one dialect per model family.

Parsers read an answer's text as it comes and say what each piece of it is. They know characters; they refuse to know
tokens, HTTP and JSON Schema. What they cannot read is content, never an error.
"""
