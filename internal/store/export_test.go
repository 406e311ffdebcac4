package store

// Families is how many are kept.
func (m *Memory) Families() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.families)
}
