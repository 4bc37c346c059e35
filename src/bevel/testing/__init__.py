"""Contract suites that anyone can inherit for their own plugins.

A suite is a class of pytest tests that says what a kind of plugin must do. Name your plugin in a
subclass, in a test file of your own:

    from bevel.testing.runtimes import RuntimeContract


    class TestMyRuntime(RuntimeContract):
        name = "my_runtime"

The plugin is found by its name, as bevel finds it: through an entry point `bevel.runtimes` (see
`bevel.core.plugins`). A plugin whose package is not installed is skipped, with the reason. Some
suites ask for more, such as `section` of `DatasetContract`; their docstrings say what.

The suites need pytest (the extra `dev`). For readable failures, write
`pytest.register_assert_rewrite("bevel.testing")` into your `conftest.py`.
"""
