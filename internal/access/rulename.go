package access

import (
	"fmt"
	"sync"
)

// ruleNames are made once: the audit log names a rule for each call.
var ruleNames = sync.OnceValue(func() []string {
	names := make([]string, 1000) // further rules cost an allocation
	for i := range names {
		names[i] = fmt.Sprintf("policy[%d]", i)
	}
	return names
})

// ruleName names a rule as the configuration would.
func ruleName(index int) string {
	if names := ruleNames(); index >= 0 && index < len(names) {
		return names[index]
	}
	return fmt.Sprintf("policy[%d]", index)
}
