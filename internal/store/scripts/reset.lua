#!lua flags=allow-oom
-- reset forgets the failure, and the presentations in doubt. A call under way may
-- still save, but not fail.
load()
clearFailure(number('f'))
local c = consent()
if c then
  local p = presentations(c.id)
  p.count = 0
  putPresentations(p)
  c.proof = math.max(c.proof, c.dead)
  putConsent(c, H.rt)
end
put('nc', nil)
reset()
commit('reset')
return reply('OK')
