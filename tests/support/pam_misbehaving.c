/* A module of PAM that does what its arguments say, before it accepts the user. */
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int pam_prompt(void *handle, int style, char **answer, const char *format, ...);
int pam_set_item(void *handle, int item, const void *value);
int pam_get_authtok(void *handle, int item, const char **token, const char *prompt);

int pam_sm_authenticate(void *handle, int flags, int count, const char **arguments) {
    char *answer = 0;
    const char *token = 0;
    for (int at = 0; at < count; at++) {
        const char *what = arguments[at];
        if (!strcmp(what, "password")) pam_get_authtok(handle, 6, &token, 0);
        if (!strcmp(what, "code")) pam_prompt(handle, 1, &answer, "Verification code: ");
        if (!strcmp(what, "shown")) pam_prompt(handle, 2, &answer, "Your pet: ");
        if (!strcmp(what, "text")) pam_prompt(handle, 4, &answer, "Welcome");
        if (!strcmp(what, "print")) for (int line = 0; line < 100000; line++) puts("noise"), fputs("noise\n", stderr);
        if (!strcmp(what, "change")) {
            setlocale(LC_ALL, "de_DE.UTF-8"), umask(0), chdir("/tmp");
            for (int number = 1; number < 65; number++) signal(number, SIG_IGN);
        }
        if (!strcmp(what, "close")) for (int fd = 0; fd < 3; fd++) close(fd);
        if (!strcmp(what, "rename")) pam_set_item(handle, 2, "bob");
        if (!strcmp(what, "crash")) raise(SIGSEGV);
        if (!strcmp(what, "exit")) _exit(0);
        if (!strcmp(what, "hang")) for (;;) pause();
        if (!strcmp(what, "daemon") && !fork()) { setsid(); sleep(3); _exit(0); }
        if (!strncmp(what, "code=", 5)) { int code; sscanf(what, "code=%d", &code); return code; }
    }
    return 0;
}

int pam_sm_setcred(void *handle, int flags, int count, const char **arguments) { return 0; }
int pam_sm_acct_mgmt(void *handle, int flags, int count, const char **arguments) {
    return pam_sm_authenticate(handle, flags, count, arguments);
}
