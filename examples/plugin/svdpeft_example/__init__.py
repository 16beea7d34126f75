"""A task, a method and a model beside svdpeft: after ``pip install examples/plugin`` all commands know them."""
