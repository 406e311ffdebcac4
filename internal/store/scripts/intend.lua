#!lua
-- intend commits to presenting the refresh token.
--
-- arg: owner, fence, refresh (its id), horizon, most.
load()
local l, c, i = lease(), consent(), intent()
if not holds(l) then return reply('LOST') end
if not c or c.id ~= arg.refresh or tombstoned(c.id) then return reply('CHANGED') end
if isMine(i) and i.id == c.id then
  touch()
  commit()
  return reply('OK')
end
if i and i.ends > now then return reply('IN_DOUBT') end
local count = presentations(c.id)
if count >= tonumber(arg.most) and c.rotates ~= 'no' then return reply('SPENT') end
put('i', intended({fence = l.fence, id = c.id, ends = now + tonumber(arg.horizon), owner = arg.owner}))
putPresentations(c.id, count + 1, now)
commit()
return reply('OK')
