#!lua flags=allow-oom
-- reset forgets the failure, and the presentations in doubt. A call under way may
-- still save, but not fail.
load()
clearFailure(number('f'))
put('p', nil)
put('nc', nil)
put('rs', int(math.max(now, number('rs') + 1)))
commit('reset')
return reply('OK')
