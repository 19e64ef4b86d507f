"""SuperClass as an example of a method that brings every part of a recipe itself."""
