// Tells systemd (Type=notify) how far the server is. Without NOTIFY_SOCKET nothing happens.
#ifndef TPSHARD_ENGINE_SERVE_NOTIFY_H
#define TPSHARD_ENGINE_SERVE_NOTIFY_H

// "READY=1", "STATUS=loading", "STOPPING=1"; several lines are separated by '\n'.
void notify(const char *state);

#endif
