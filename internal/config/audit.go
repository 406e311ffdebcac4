package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/audit"
)

// audit is standard output unless the message says otherwise.
func (l *load) audit(whole *configv1.Config) audit.Settings {
	message := whole.GetAudit()
	s := audit.Settings{Refuse: message.GetWhenUnwritable() == "refuse"}
	switch message.GetDestination().(type) {
	case *configv1.Audit_File:
		s.File = l.absolute(message.GetFile())
		l.warnOfAuditFile(message.GetFile())
	case *configv1.Audit_Syslog:
		s.Syslog = audit.Syslog{Network: "unix", Address: "/dev/log", Facility: message.GetSyslog().GetFacility()}
		if network, address, found := strings.Cut(message.GetSyslog().GetAddress(), ":"); found {
			s.Syslog.Network, s.Syslog.Address = network, address
		}
	case *configv1.Audit_Disabled:
		s.Disabled = true
		l.warnOfNoAudit(whole)
	}
	return s
}

// warnOfAuditFile warns of a file that lines could not be written to. The check
// may be made elsewhere than where the server runs, so that is no problem yet.
func (l *load) warnOfAuditFile(name string) {
	const at = "audit.file"
	if l.tainted[at] {
		return
	}
	path := l.absolute(name)
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Mode().IsRegular():
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			l.warning(at, fmt.Sprintf("%s cannot be written to: %v; the server will not start without it", l.shown(name), withoutPath(err)))
			return
		}
		file.Close()
	case err == nil && info.Mode()&(os.ModeDir|os.ModeNamedPipe|os.ModeSocket) != 0:
		l.warning(at, fmt.Sprintf("%s is no file; the server will not start with it", l.shown(name)))
	case err != nil:
		if info, err := os.Stat(filepath.Dir(path)); err != nil || !info.IsDir() {
			l.warning(at, fmt.Sprintf("there is no directory for %s; the server will not start without it", l.shown(name)))
		}
	}
}

// warnOfNoAudit warns when it is known who callers are, and not written down.
func (l *load) warnOfNoAudit(message *configv1.Config) {
	switch {
	case message.GetAudit().GetWhenUnwritable() == "refuse":
		l.problem("audit.when_unwritable", "there is nothing to write with disabled: remove one of the two")
	case message.GetServer().GetTls() != nil || strings.HasPrefix(message.GetServer().GetAddress(), "unix:"):
		l.warning("audit.disabled", "nobody will be able to tell who was given which token: remove it, unless something else writes that down")
	}
}
