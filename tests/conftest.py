"""Settings every test needs."""

import signal

# A run started in a shell's background inherits an ignored SIGINT; tests that send Ctrl-C to children need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)
