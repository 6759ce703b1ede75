// Tells systemd (Type=notify) how far the server is. Without NOTIFY_SOCKET nothing happens.
#ifndef TPSHARD_ENGINE_SERVE_NOTIFY_H
#define TPSHARD_ENGINE_SERVE_NOTIFY_H

// "READY=1", "STATUS=loading", "STOPPING=1"; several lines are separated by '\n'.
void notify(const char *state);
// How often "WATCHDOG=1" is to be said: half of the time after which systemd ends a service that is silent (WatchdogSec); 0: never.
double notify_watchdog_s(void);

#endif
